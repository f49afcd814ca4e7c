"""Benchmarks: both models have equal weights and results, operations are counted, reports name missed aims."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import SHAPES, Case, operations_of, transformer_encoder
from benchmarks.measure import interleaved
from benchmarks.report import BEGIN, END, Report, Row, write_into
from tests.literal import LiteralQLIP, literal_forward


@pytest.fixture(params=list(SHAPES))
def case(request: pytest.FixtureRequest) -> Case:
    torch.set_num_threads(1)
    return Case(request.param, 7, tiny=True)


def test_case_models__equal_weights_give_equal_results(case: Case) -> None:
    literal, model = case.models()
    pixels, ids = case.inputs()
    model.train()
    ours, theirs = model(pixels, ids, return_loss=True), literal(pixels, ids)
    assert torch.equal(model.encode(pixels), literal.encode(pixels))
    assert torch.equal(ours.indices, theirs["indices"])
    for name in ("reconstructions", "loss", "quantizer_loss"):
        torch.testing.assert_close(getattr(ours, name), theirs[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(ours.indices), literal.decode(ours.indices), rtol=1e-4, atol=1e-5)
    (F.mse_loss(ours.reconstructions, pixels) + ours.loss + ours.quantizer_loss).backward()
    (F.mse_loss(theirs["reconstructions"], pixels) + theirs["loss"] + theirs["quantizer_loss"]).backward()
    gradients = {name: tensor.grad for name, tensor in literal.parameters_by_name().items()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_case_models__literal_model_is_the_literal_forward(case: Case) -> None:
    literal, model = case.models()
    pixels, ids = case.inputs()
    expected = literal_forward(model.state_dict(), case.config(), pixels, ids)
    timed = literal(pixels, ids)
    assert isinstance(literal, LiteralQLIP)
    assert torch.equal(timed["indices"], expected["group_indices"])
    for name, other in (("reconstructions", "reconstructions"), ("quantizer_loss", "quantizer.loss"), ("loss", "loss")):
        torch.testing.assert_close(timed[name], expected[other])


def test_operations_of__equals_the_flop_counter(case: Case) -> None:
    literal, model = case.models()
    pixels, _ = case.inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as of_encode:
        indices = literal.encode(pixels)
    with torch.no_grad(), FlopCounterMode(display=False) as of_decode:
        literal.decode(indices)
    tokens = case.batch * model.grid[0] * model.grid[1]
    table = 2 * tokens * model.num_bits * 2**case.group_size  # table of corners, which the model does not compute
    assert of_encode.get_total_flops() - table == operations_of(case, "encode")
    assert of_decode.get_total_flops() == operations_of(case, "decode")


def test_transformer_encoder__as_many_weights_as_the_encoder(case: Case) -> None:
    """Count the weights of matrices: SwiGLU has three narrower products, the other two wider ones."""
    _, model = case.models()
    ours = sum(p.numel() for p in model.vision_model.encoder.parameters() if p.dim() == 2)
    assert sum(p.numel() for p in transformer_encoder(case).parameters() if p.dim() == 2) == ours


def test_interleaved__rounds_rotate_the_order() -> None:
    ran: list[str] = []
    seconds = interleaved({name: lambda name=name: ran.append(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(ran) == "abcbcacababc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_report__missed_aims_are_written(tmp_path: Path) -> None:
    row = Row("B-16", 14, "encode", {"literal": [1.0, 3.0, 2.0], "qlip": [2.0, 1.0, 4.0]}, 1e9, 1e9)
    report = Report("a machine", "2026-01-01", 3, [row])
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_into(page, report.markdown())
    text = page.read_text()
    assert "| B-16 | 14 | encode | 2.000 | 2.000 | 1.00x | 0.50 | - | - | - |" in text
    assert "| B-16 encode, G = 14, at least 1.4x | 1.00 | **no** |" in text
    assert "| B-8 encode at least 1.4x | - | - |" in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
