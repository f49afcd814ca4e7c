"""Speed and savings of entropy coding: ``python -m benchmarks.codec``.

- MB of raw tokens coded and decoded per second, one image at a time and in batches (aim: decode 0.3 MB/s);
- ``--rate-distortion FILE``: plot of PSNR against bits per pixel on held-out images, for the bundled model with raw and
  coded tokens, JPEG and WebP.

One thread. Tokens are the bundled model's, of crops of the demo images. No other program should run on the machine.
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
from qlip.evaluation.report.compare import compare
from qlip.evaluation.run.evaluate import run_specs
from qlip.evaluation.run.suites import CLIPART, EMOJI, LARGE, PHOTOGRAPHS, specs_for
from qlip.modeling import load_image
from qlip.tokens import TokenCodec, TokenCodecs, pack_batch

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- codec: begin -->", "<!-- codec: end -->"
AIM = 0.3
"""Smallest decoding speed of a single stream, in MB of raw tokens per second."""
BUDGETS = (100, 150, 224, 320, 480, 720)
"""Bytes per image for JPEG and WebP, without headers."""
MODEL = assets.BUNDLED


def main() -> None:
    """Measure, print the table and optionally write it; or draw the plot."""
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
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per measurement (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="use four images, to test the benchmark itself")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/README.md")
    parser.add_argument(
        "--rate-distortion", type=Path, metavar="FILE.png", help="draw the rate-distortion plot instead of timing"
    )
    parser.add_argument("--limit", type=int, default=60, help="images per set in the plot (default: 60)")
    return parser.parse_args()


def coder() -> TokenCodec:
    """Return the bundled model's entropy coder."""
    codec = TokenCodecs.of_model(MODEL).current
    assert codec is not None, "the bundled model comes with its tables"
    return codec


@torch.inference_mode()
def tokens(side: int, count: int) -> list[bytes]:
    """Encode random crops of the demo images, resized to ``side`` pixels, to packed tokens."""
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
    """Measure the speed, and make the lines of the table."""
    codec = coder()
    yield "| tokens | bytes raw, coded | MB/s coded singly | decoded singly | coded in batches | decoded in batches |"
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
                "coded singly": lambda: one_by_one("encode"),
                "decoded singly": lambda: one_by_one("decode"),
                "coded in batches": lambda images=images, grid=grid: codec.encode(images, grid),  # type: ignore[misc]
                "decoded in batches": lambda coded=coded, grid=grid: codec.decode(coded, grid),  # type: ignore[misc]
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
    yield f"MB of raw tokens. A single stream decodes at least {min(alone):.2f} MB/s (aim: {AIM} MB/s): {met}."


class EntropyCoded(QLIPEvalModel):
    """Evaluation model whose size per image is that of the entropy-coded tokens."""

    codec: TokenCodec

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:
        """Reconstruct as usual, and count the coded bytes."""
        found = super().reconstruct(pixel_values)
        assert found.indices is not None
        coded = self.codec.encode(pack_batch(found.indices, self.model.group_size), self.model.grid_of(pixel_values))
        return Reconstructed(found.pixels, torch.tensor([len(one) for one in coded]), found.indices)


def draw(path: Path, limit: int) -> None:
    """Plot PSNR against bits per pixel, one panel per set."""
    network, processor = QLIPModel.from_pretrained(MODEL), QLIPProcessor.from_pretrained(MODEL)
    coded = EntropyCoded(network, processor, f"{MODEL}, entropy-coded")
    coded.codec = coder()
    models: list[EvalModel] = [QLIPEvalModel(network, processor, f"{MODEL}, raw bits"), coded]
    for codec in ("jpeg", "webp"):
        models += [CodecEvalModel(codec, budget, processor.preprocessing) for budget in BUDGETS]
    results = []
    for model in models:
        outcome = run_specs(model, specs_for([PHOTOGRAPHS, LARGE, EMOJI, CLIPART], ["reconstruction"], limit))
        assert outcome is not None
        results.append(outcome.result)
        print(model.name, flush=True)
        for one in outcome.result.measured:
            print(f"  {one.data}: {one.values['bits_per_pixel'].value:.4f} bpp, {one.values['psnr'].value:.2f} dB")
    plots.rate_distortion(compare(results), path)


if __name__ == "__main__":
    main()
