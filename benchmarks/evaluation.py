"""Cost of metrics relative to the model: ``python -m benchmarks.evaluation``.

- pixel metrics relative to encode + decode at the size of B-16 (aim for PSNR, SSIM and L1 together: at most 25%), and
  SSIM of torchmetrics for comparison;
- metrics that run a network, in a separate table.

Random weights: time does not depend on them. Medians of interleaved rounds. No other program should run on the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.report import publish
from qlip import QLIPConfig, QLIPModel, QLIPProcessor
from qlip.evaluation.evaluators.reconstruction import shrink_to_bytes
from qlip.evaluation.metrics.pixel import SMALLEST_MS_SSIM, l1, ms_ssim, psnr, round_to_8_bit, ssim
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.networks.lpips import LPIPS
from qlip.modeling import Preprocessing

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
AIM = 0.25
"""Largest share of encode + decode for PSNR, SSIM and L1 together."""

Piece = Callable[[], None]


def main() -> None:
    """Measure, print the tables, and write the files that were asked for."""
    options = _options()
    measure.prepare(options.threads, options.tiny)
    lines = costs(options.rounds, options.tiny)
    publish(f"medians of {options.rounds} rounds", lines, README, BEGIN, END, options.write)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per measurement (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="use a small model, to test the benchmark itself")
    parser.add_argument("--threads", type=int, help="number of PyTorch threads (default: chosen by PyTorch)")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/README.md")
    return parser.parse_args()


def costs(rounds: int, tiny: bool) -> Iterator[str]:
    """Measure, and make the lines of both tables."""
    case = Case("B-16", 7, tiny)
    pixel_values = case.inputs()[0]
    side, batch = pixel_values.shape[-1], len(pixel_values)
    prepared = Preprocessing((side, side), side)
    model = QLIPEvalModel(QLIPModel(QLIPConfig.from_dict(case.config())).eval(), QLIPProcessor(prepared), case.shape)
    with torch.inference_mode():
        found = model.reconstruct(pixel_values)
    reconstructed, originals = round_to_8_bit(found.pixels), round_to_8_bit(prepared.denormalize(pixel_values))
    pixels, networks = _pixels(reconstructed, originals, int(found.num_bytes[0])), _networks(reconstructed, originals)
    work: dict[str, Piece] = {
        "encode + decode": lambda: _done(model.reconstruct(pixel_values).pixels),
        **pixels,
        **networks,
    }
    with torch.inference_mode():
        timed = measure.interleaved(work, rounds)
    seconds = {name: measure.median(times) / batch for name, times in timed.items()}
    whole = seconds["encode + decode"]
    shape = f"{side} x {side} pixels, batch {batch}"
    yield f"| {shape} | ms per image | of encode + decode |"
    yield "|---|---|---|"
    for name in ("encode + decode", *pixels):
        yield f"| {name} | {1000 * seconds[name]:.2f} | {seconds[name] / whole:.1%} |"
    share = seconds[TOGETHER] / whole
    met = "not meaningful for a tiny model" if tiny else "met" if share <= AIM else "**missed**"
    yield ""
    yield f"{TOGETHER} cost {share:.1%} (aim: at most {AIM:.0%}): {met}."
    yield ""
    yield "| metric with a network | ms per image | of encode + decode |"
    yield "|---|---|---|"
    for name in networks:
        yield f"| {name} | {1000 * seconds[name]:.1f} | {seconds[name] / whole:.1%} |"


TOGETHER = "PSNR, SSIM and L1 together"


def _pixels(reconstructed: Tensor, originals: Tensor, num_bytes: int) -> dict[str, Piece]:
    """Metrics of an image pair that run no network."""
    work: dict[str, Piece] = {
        "PSNR": lambda: _done(psnr(reconstructed, originals)),
        "SSIM": lambda: _done(ssim(reconstructed, originals)),
        "L1": lambda: _done(l1(reconstructed, originals)),
        TOGETHER: lambda: _done(
            psnr(reconstructed, originals), ssim(reconstructed, originals), l1(reconstructed, originals)
        ),
        "torchmetrics' SSIM, for comparison": lambda: _torchmetrics(reconstructed, originals),
        "the shrunk baseline, with PSNR and SSIM": lambda: _baseline(originals, num_bytes),
    }
    if originals.shape[-1] >= SMALLEST_MS_SSIM:
        work["MS-SSIM"] = lambda: _done(ms_ssim(reconstructed, originals))
    return work


def _baseline(originals: Tensor, num_bytes: int) -> None:
    shrunk = round_to_8_bit(shrink_to_bytes(originals, num_bytes))
    _done(psnr(shrunk, originals), ssim(shrunk, originals))


def _torchmetrics(reconstructed: Tensor, originals: Tensor) -> None:
    structural_similarity_index_measure(reconstructed, originals, data_range=1.0, reduction="none")


def _networks(reconstructed: Tensor, originals: Tensor) -> dict[str, Piece]:
    """LPIPS of both networks; each pair takes two forward passes."""
    first, second = 2 * reconstructed - 1, 2 * originals - 1
    vgg, alex = LPIPS("vgg"), LPIPS("alex")
    return {
        "LPIPS, VGG16": lambda: _done(vgg(first, second)),
        "LPIPS, AlexNet": lambda: _done(alex(first, second)),
    }


def _done(*values: Tensor) -> None:
    """Check that results exist; they are not used."""
    assert all(len(value) for value in values)


if __name__ == "__main__":
    main()
