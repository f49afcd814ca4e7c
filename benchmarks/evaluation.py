"""What measuring costs on top of the model: ``python -m benchmarks.evaluation``.

- the metrics of pixels against encode + decode at B-16's size, PSNR, SSIM and L1 together (aim: at most 25%), beside
  torchmetrics' SSIM;
- metrics that run a network, which are reported apart.

Random weights: time does not depend on them. Medians of interleaved rounds. Nothing else should run on the machine.
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
"""Of encode + decode, for PSNR, SSIM and L1 together."""

Piece = Callable[[], None]


def main() -> None:
    """Run, print the tables, and write what was asked for."""
    options = _options()
    measure.prepare(options.threads, options.tiny)
    lines = costs(options.rounds, options.tiny)
    publish(f"medians of {options.rounds} rounds", lines, README, BEGIN, END, options.write)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of everything (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="a small model: does the benchmark itself run?")
    parser.add_argument("--threads", type=int, help="PyTorch's threads (default: its own choice)")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    return parser.parse_args()


def costs(rounds: int, tiny: bool) -> Iterator[str]:
    """Lines of both tables."""
    case = Case("B-16", 7, tiny)
    pixel_values = case.inputs()[0]
    side, batch = pixel_values.shape[-1], len(pixel_values)
    prepared = Preprocessing((side, side), side)
    subject = QLIPEvalModel(QLIPModel(QLIPConfig.from_dict(case.config())).eval(), QLIPProcessor(prepared), case.shape)
    with torch.inference_mode():
        found = subject.rebuild(pixel_values)
    rebuilt, originals = round_to_8_bit(found.pixels), round_to_8_bit(prepared.denormalize(pixel_values))
    pixels, networks = _pixels(rebuilt, originals, int(found.num_bytes[0])), _networks(rebuilt, originals)
    work: dict[str, Piece] = {
        "encode + decode": lambda: _done(subject.rebuild(pixel_values).pixels),
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
    met = "a tiny model says nothing" if tiny else "met" if share <= AIM else "**missed**"
    yield ""
    yield f"{TOGETHER} cost {share:.1%} (aim: at most {AIM:.0%}): {met}."
    yield ""
    yield "| metric with a network | ms per image | of encode + decode |"
    yield "|---|---|---|"
    for name in networks:
        yield f"| {name} | {1000 * seconds[name]:.1f} | {seconds[name] / whole:.1%} |"


TOGETHER = "PSNR, SSIM and L1 together"


def _pixels(rebuilt: Tensor, originals: Tensor, num_bytes: int) -> dict[str, Piece]:
    """What is computed of every pair without a network."""
    work: dict[str, Piece] = {
        "PSNR": lambda: _done(psnr(rebuilt, originals)),
        "SSIM": lambda: _done(ssim(rebuilt, originals)),
        "L1": lambda: _done(l1(rebuilt, originals)),
        TOGETHER: lambda: _done(psnr(rebuilt, originals), ssim(rebuilt, originals), l1(rebuilt, originals)),
        "torchmetrics' SSIM, for comparison": lambda: _torchmetrics(rebuilt, originals),
        "the shrunk baseline, with PSNR and SSIM": lambda: _baseline(originals, num_bytes),
    }
    if originals.shape[-1] >= SMALLEST_MS_SSIM:
        work["MS-SSIM"] = lambda: _done(ms_ssim(rebuilt, originals))
    return work


def _baseline(originals: Tensor, num_bytes: int) -> None:
    shrunk = round_to_8_bit(shrink_to_bytes(originals, num_bytes))
    _done(psnr(shrunk, originals), ssim(shrunk, originals))


def _torchmetrics(rebuilt: Tensor, originals: Tensor) -> None:
    structural_similarity_index_measure(rebuilt, originals, data_range=1.0, reduction="none")


def _networks(rebuilt: Tensor, originals: Tensor) -> dict[str, Piece]:
    """LPIPS of both networks: two looks a pair."""
    first, second = 2 * rebuilt - 1, 2 * originals - 1
    vgg, alex = LPIPS("vgg"), LPIPS("alex")
    return {
        "LPIPS, VGG16": lambda: _done(vgg(first, second)),
        "LPIPS, AlexNet": lambda: _done(alex(first, second)),
    }


def _done(*values: Tensor) -> None:
    """Run the computation; its result is not used."""
    assert all(len(value) for value in values)


if __name__ == "__main__":
    main()
