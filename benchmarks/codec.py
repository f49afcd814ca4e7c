"""What entropy coding of tokens costs and buys: ``python -m benchmarks.codec``.

- megabytes of raw tokens a second, coded and decoded, one image at a time and many at once (aim: decode 0.3 MB/s);
- ``--rate-distortion FILE``: PSNR against bits per pixel of the bundled model, its tokens raw and coded, beside JPEG
  and WebP, on held-out images.

One thread. Real tokens of the bundled model, of crops of the demo images. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks import measure
from benchmarks.report import publish
from qlip import QLIPModel, QLIPProcessor, assets
from qlip.evaluation.models.base import EvalModel, QLIPEvalModel, Reconstructed
from qlip.evaluation.models.codecs import CodecEvalModel
from qlip.evaluation.report import plots
from qlip.evaluation.run.evaluate import run_specs
from qlip.evaluation.run.suites import CLIPART, EMOJI, LARGE, PHOTOGRAPHS, specs_for
from qlip.modeling import load_image
from qlip.tokens import TokenCodec, TokenCodecs, pack_batch

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- codec: begin -->", "<!-- codec: end -->"
AIM = 0.3
"""Megabytes of raw tokens a second that one stream decodes."""
BUDGETS = (100, 150, 224, 320, 480, 720)
"""Bytes an image that JPEG and WebP get, without headers."""
MODEL = assets.BUNDLED


def main() -> None:
    """Run, print the table, and write or draw what was asked for."""
    options = _options()
    torch.set_num_threads(1)
    if options.rate_distortion is not None:
        draw(options.rate_distortion, options.limit)
        return
    measure.prepare(1, options.tiny)
    lines = speed(options.rounds, 4 if options.tiny else 256)
    publish(f"medians of {options.rounds} rounds", lines, README, BEGIN, END, options.write)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of everything (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="four images: does the benchmark itself run?")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--rate-distortion", type=Path, metavar="FILE.png", help="draw this instead of timing")
    parser.add_argument("--limit", type=int, default=60, help="images of each set in the drawing (default: 60)")
    return parser.parse_args()


def coder() -> TokenCodec:
    """The bundled model's."""
    codec = TokenCodecs.of_model(MODEL).current
    assert codec is not None, "the bundled model comes with its tables"
    return codec


@torch.inference_mode()
def tokens(side: int, count: int) -> list[bytes]:
    """Packed tokens of random crops of the demo images at a size in pixels."""
    model, preprocessing = QLIPModel.from_pretrained(MODEL), QLIPProcessor.from_pretrained(MODEL).preprocessing
    draw_from, images = random.Random(0), sorted(assets.path("images").glob("*.jpg"))
    crops: list[Tensor] = []
    for _ in range(count):
        image = load_image(draw_from.choice(images))
        edge = draw_from.randint(min(image.size) // 3, min(image.size))
        left, top = (draw_from.randint(0, length - edge) for length in image.size)
        crop = image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BICUBIC)
        crops.append(preprocessing.pixels(crop))
    return [
        packed
        for start in range(0, count, 16)
        for packed in pack_batch(model.encode(torch.stack(crops[start : start + 16])), model.group_size)
    ]


def speed(rounds: int, count: int) -> Iterator[str]:
    """Lines of the table."""
    codec = coder()
    yield "| tokens | bytes raw, coded | MB/s coded one by one | decoded one by one | coded at once | decoded at once |"
    yield "|---|---|---|---|---|---|"
    alone = []
    for side in (64, 128):
        grid, images = (side // 8, side // 8), tokens(side, count)
        coded = codec.encode(images, grid)

        def one_by_one(what: str, images: list[bytes] = images, coded: list[bytes] = coded, grid=grid) -> None:  # type: ignore[no-untyped-def]
            for one in images if what == "encode" else coded:
                getattr(codec, what)([one], grid)

        seconds = measure.interleaved(
            {
                "coded one by one": lambda: one_by_one("encode"),
                "decoded one by one": lambda: one_by_one("decode"),
                "coded at once": lambda images=images, grid=grid: codec.encode(images, grid),  # type: ignore[misc]
                "decoded at once": lambda coded=coded, grid=grid: codec.decode(coded, grid),  # type: ignore[misc]
            },
            rounds,
        )
        raw = sum(map(len, images)) / 1e6
        rates = [raw / measure.median(times) for times in seconds.values()]
        alone.append(rates[1])
        sizes = f"{len(images[0])}, {sum(map(len, coded)) / count:.1f}"
        yield (
            f"| {grid[0]} x {grid[1]} x {codec.num_bits} bits | {sizes} | "
            + " | ".join(f"{r:.2f}" for r in rates)
            + " |"
        )
    met = "met" if min(alone) >= AIM else "**missed**"
    yield ""
    yield f"MB are of raw tokens. A stream alone decodes {min(alone):.2f} MB/s or more (aim: {AIM} MB/s): {met}."


class EntropyCoded(QLIPEvalModel):
    """A model whose bytes are those of the entropy-coded tokens."""

    codec: TokenCodec

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:
        """The same images in fewer bytes."""
        found = super().reconstruct(pixel_values)
        assert found.indices is not None
        coded = self.codec.encode(pack_batch(found.indices, self.model.group_size), self.model.grid_of(pixel_values))
        return Reconstructed(found.pixels, torch.tensor([len(one) for one in coded]), found.indices)


def draw(path: Path, limit: int) -> None:
    """PSNR against bits per pixel, a panel a set."""
    network, processor = QLIPModel.from_pretrained(MODEL), QLIPProcessor.from_pretrained(MODEL)
    coded = EntropyCoded(network, processor, f"{MODEL}, entropy-coded")
    coded.codec = coder()
    subjects: list[EvalModel] = [QLIPEvalModel(network, processor, f"{MODEL}, raw bits"), coded]
    for codec in ("jpeg", "webp"):
        subjects += [CodecEvalModel(codec, budget, processor.preprocessing) for budget in BUDGETS]
    results = []
    for subject in subjects:
        outcome = run_specs(subject, specs_for([PHOTOGRAPHS, LARGE, EMOJI, CLIPART], ["reconstruction"], limit))
        assert outcome is not None
        results.append(outcome.result)
        print(subject.name, flush=True)
        for one in outcome.result.measured:
            print(f"  {one.data}: {one.values['bits_per_pixel'].value:.4f} bpp, {one.values['psnr'].value:.2f} dB")
    plots.rate_distortion(results, path)


if __name__ == "__main__":
    main()
