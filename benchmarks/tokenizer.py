"""Our model compared with a literal implementation, and that with PyTorch's stack: ``python -m benchmarks.tokenizer``.

One process, equal weights, medians of interleaved rounds; each peak memory is measured in its own process. No other
program should run on the machine. The full run takes most of an hour on two cores; ``--quick`` a few minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import measure, peak
from benchmarks.cases import OPERATIONS, SHAPES, Case, contenders, operations_of, transformer_encoder, work_of
from benchmarks.report import Report, Row, StackRow, write_into
from tests.literal import tower

README = Path(__file__).parent / "README.md"


def main() -> None:
    """Measure, print the tables, and write the files that were asked for."""
    options = _options()
    measure.prepare(options.threads, options.tiny)
    report = Report(measure.machine(), datetime.date.today().isoformat(), options.rounds)
    for path in options.add:
        report.add(json.loads(path.read_text()))
    for shape in options.shapes:
        if shape not in {row.shape for row in report.stacks}:
            report.stacks += _stack_rows(Case(shape, 7, options.tiny), options.rounds)
        for group_size in options.groups:
            case = Case(shape, group_size, options.tiny)
            report.rows += _rows(case, options.operations, options.rounds, options.memory)
    markdown = report.markdown()
    print(markdown)
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if options.write:
        write_into(README, markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizer", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per measurement (default: 5)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of the B-16 shape at G = 14, without memory")
    parser.add_argument("--tiny", action="store_true", help="shrink the models, to test the benchmark itself")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="published shapes")
    parser.add_argument("--groups", nargs="+", type=int, choices=[7, 14], default=[7, 14], help="bits per group")
    parser.add_argument(
        "--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS), help="operations to time"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    parser.add_argument("--threads", type=int, help="number of PyTorch threads (default: chosen by PyTorch)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements of every round")
    parser.add_argument(
        "--add",
        type=Path,
        metavar="FILE",
        nargs="+",
        default=[],
        help="add --json files of earlier runs on this machine and day",
    )
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/README.md")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.quick:
        options.rounds, options.shapes, options.groups, options.memory = 2, ["B-16"], [14], False
    return options


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rows(case: Case, operations: Sequence[str], rounds: int, memory: bool) -> list[Row]:
    literal, model = case.models()
    rows = []
    for operation in operations:
        _note(f"{case.shape}, G = {case.group_size}: {operation}")
        work: dict[str, Callable[[], None]] = {
            name: work_of(case, operation, name, literal, model) for name in contenders(operation)
        }
        rates: list[float] = []
        work["matmul"] = lambda rates=rates: rates.append(measure.matmul_rate())  # type: ignore[misc]
        seconds = measure.interleaved(work, rounds)
        del seconds["matmul"]
        flops = operations_of(case, operation)
        rows.append(Row(case.shape, case.group_size, operation, seconds, flops, measure.median(rates)))
    del literal, model, work
    for row, operation in zip(rows, operations, strict=True):
        if memory:
            _note(f"{case.shape}, G = {case.group_size}: memory of {operation}")
            threads = torch.get_num_threads()
            row.peaks = {name: peak.in_subprocess(case, operation, name, threads) for name in contenders(operation)}
    return rows


def _stack_rows(case: Case, rounds: int) -> list[StackRow]:
    """Time the encoder's transformer stack on equal input: literal, PyTorch's (with and without fast path), ours."""
    literal, model = case.models()
    encoder = transformer_encoder(case)
    vision = literal.config["vision_config"]
    tokens = literal.grid[0] * literal.grid[1] + 1
    x = torch.randn(case.batch, tokens, vision["hidden_size"])
    rope = model.vision_model.rope(model.grid) if model.vision_model.rope is not None else None

    def run_literal(x: Tensor) -> Tensor:
        p = literal.parameters_by_name()
        return tower(p, "vision_model", x, vision, tables=literal.vision_tables, shift=1)[-1]

    def without_fast_path(x: Tensor) -> Tensor:
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            result: Tensor = encoder(x)
            return result
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    stacks: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        "literal": (literal, run_literal),
        "nn.TransformerEncoder": (encoder, without_fast_path),
        "nn.TransformerEncoder, fast path": (encoder, encoder),
        "qlip": (model, lambda x: model.vision_model.encoder(x, rope=rope)),
    }

    def forward(module: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        @torch.no_grad()
        def call() -> None:
            module.eval()
            run(x)

        return call

    def forward_and_backward(module: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            module.train()
            run(x).sum().backward()
            module.zero_grad(set_to_none=True)

        return call

    rows = []
    for what, make in (("forward", forward), ("forward and backward", forward_and_backward)):
        _note(f"{case.shape}: the transformer stack, {what}")
        work = {name: make(module, run) for name, (module, run) in stacks.items()}
        rows.append(StackRow(case.shape, what, measure.interleaved(work, rounds)))
    return rows


if __name__ == "__main__":
    main()
