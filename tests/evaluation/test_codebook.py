"""Codes are counted as a person would count them, and what is wrong with them is seen."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.metrics import mutual_info_score
from torch import Tensor

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.data.loader.eval_set import EvalBatch
from qlip.evaluation.evaluators import registry
from qlip.evaluation.evaluators.base import MetricResult, Rows
from qlip.evaluation.evaluators.codebook import Codebook, count, draw, grid_of
from qlip.evaluation.models.base import EvalModel, QLIPEvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.evaluation.run.evaluate_dataset import evaluate_dataset
from qlip.modeling import Preprocessing, bits_to_indices, indices_to_bits
from qlip.tokens import pack_batch

from .known import rows_of
from .plain import opened
from .tiny import write_images


class Coded(EvalModel):
    """Its codes are given."""

    def __init__(self, indices: Tensor, group_size: int, size: tuple[int, int] = (32, 48)) -> None:
        self.name, self.capabilities, self.device = "coded", frozenset({"tokenize"}), torch.device("cpu")
        self.preprocessing, self.fingerprint = Preprocessing(size, min(size)), "0" * 64
        self.indices, self.group_size = indices, group_size

    def tokenize(self, pixel_values: Tensor) -> Tensor:
        """All of them."""
        return self.indices


def batch_of(count: int) -> EvalBatch:
    return EvalBatch(torch.zeros(count, 3, 8, 8), [()] * count, [None] * count, [str(one) for one in range(count)])


def packed_rows(model: Coded, chunk: int = 7) -> Rows:
    return rows_of(Codebook().rows(ModelBatch(model, batch_of(len(model.indices)))), chunk=chunk)


def found_of(indices: Tensor, group_size: int, **settings: float) -> MetricResult:
    model = Coded(indices, group_size)
    return Codebook(**settings).summarize(model, packed_rows(model))  # type: ignore[arg-type]


def uneven_bits(images: int = 23, tokens: int = 6, width: int = 6) -> Tensor:
    """Bits of different shares, one that copies another, one that copies its opposite, one that never changes."""
    draw = torch.Generator().manual_seed(3)
    bits = torch.rand(images, tokens, width, generator=draw) < torch.tensor([0.5, 0.3, 0.9, 0.5, 0.5, 0.5])
    bits[..., 3], bits[..., 4], bits[..., 5] = bits[..., 0], ~bits[..., 1], False
    return bits


def literal_entropy(things: list[object]) -> float:
    counts = Counter(things)
    return -sum(n / len(things) * math.log2(n / len(things)) for n in counts.values())


def test_codebook__metrics_are_those_of_a_literal_count() -> None:
    bits = uneven_bits()
    found = found_of(bits_to_indices(bits, 2), 2)
    tokens = [tuple(token) for image in bits.tolist() for token in image]
    entropies = [literal_entropy([token[at] for token in tokens]) for at in range(6)]
    groups = [[token[at : at + 2] for token in tokens] for at in (0, 2, 4)]
    group_entropies = [literal_entropy(list(group)) for group in groups]
    value = {name: one.value for name, one in found.values.items()}
    assert value["tokens"] == len(tokens) == 23 * 6
    assert value["bit_entropy"] == pytest.approx(sum(entropies) / 6, abs=1e-12)
    assert value["bit_entropy_min"] == 0
    assert value["group_entropy"] == pytest.approx(sum(group_entropies) / 3, abs=1e-12)
    assert value["group_entropy_min"] == pytest.approx(min(group_entropies), abs=1e-12)
    assert value["group_usage"] == pytest.approx(100 * sum(len(set(group)) / 4 for group in groups) / 3)
    assert value["group_perplexity"] == pytest.approx(sum(2**one for one in group_entropies) / 3)
    corrected = [
        min(2, one + (len(set(group)) - 1) / (2 * len(tokens) * math.log(2)))
        for one, group in zip(group_entropies, groups, strict=True)
    ]
    assert value["group_entropy_corrected"] == pytest.approx(sum(corrected) / 3)
    expected = torch.tensor(
        [
            [
                literal_entropy([t[i] for t in tokens])
                + literal_entropy([t[j] for t in tokens])
                - literal_entropy([(t[i], t[j]) for t in tokens])
                for j in range(6)
            ]
            for i in range(6)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found.arrays["mutual_information"], expected, atol=1e-12, rtol=0)
    where = [sum(literal_entropy(bits[:, at, bit].tolist()) for bit in range(6)) / 6 for at in range(6)]
    torch.testing.assert_close(found.arrays["position_entropy"].flatten(), torch.tensor(where, dtype=torch.float64))
    assert found.arrays["position_entropy"].shape == (2, 3)  # as the image of 32 x 48


def test_codebook__mutual_information_is_scikit_learns() -> None:
    bits = uneven_bits()
    information = found_of(bits_to_indices(bits, 1), 1).arrays["mutual_information"]
    flat = bits.view(-1, 6).numpy()
    for first, second in ((0, 3), (0, 1), (2, 4), (1, 5)):
        expected = mutual_info_score(flat[:, first], flat[:, second]) / math.log(2)
        assert float(information[first, second]) == pytest.approx(expected, abs=1e-12)


def test_codebook__dead_and_tied_bits_are_named() -> None:
    found = found_of(bits_to_indices(uneven_bits(), 3), 3)
    assert found.values["dead_bits"].value == 1
    assert [record["bit"] for record in found.tables["bits"] if record["dead"]] == [5]
    assert found.values["tied_bits"].value == 2
    pairs = {(record["bit"], record["other"]): record["correlation"] for record in found.tables["tied"]}
    assert pairs == {(0, 3): pytest.approx(1), (1, 4): pytest.approx(-1)}
    assert found.values["mutual_information_max"].value == pytest.approx(found.tables["bits"][0]["entropy"])


def test_codebook__counts_are_exact_and_independent_of_chunks_and_groups() -> None:
    bits = uneven_bits(31, 5, 6)
    one, other = (count(packed_rows(Coded(bits_to_indices(bits, g), g), chunk), g) for g, chunk in ((2, 4), (6, 31)))
    assert torch.equal(one.ones, other.ones) and torch.equal(one.ones, bits.sum(0))
    assert torch.equal(one.both, other.both)
    flat = bits.view(-1, 6).long()
    assert torch.equal(one.both, flat.t() @ flat)
    assert one.values is not None and other.values is not None
    assert one.values.sum() == 3 * 31 * 5 and other.values.shape == (1, 64)
    assert torch.equal(one.values[0], other.values.view(4, 16).sum(1))  # the first group is the most significant bits


def test_codebook__rows_are_the_bytes_of_a_token_file() -> None:
    indices = torch.randint(0, 8, (4, 5, 3), generator=torch.Generator().manual_seed(1))
    columns = Codebook().rows(ModelBatch(Coded(indices, 3), batch_of(4)))
    assert [row.numpy().tobytes() for row in columns["bits"]] == pack_batch(indices, 3)
    assert columns["bits"].dtype == torch.uint8 and columns["bits"].shape == (4, 6)
    assert columns["shape"].tolist() == [[5, 3]] * 4


def test_codebook__uniform_codes_have_all_entropy_and_few_tokens_are_warned_of() -> None:
    draw = torch.Generator().manual_seed(0)
    plenty = found_of(torch.randint(0, 4, (200, 16, 2), generator=draw), 2)
    assert plenty.values["group_entropy"].value == pytest.approx(2, abs=0.01) and "group_entropy" not in plenty.notes
    few = found_of(torch.randint(0, 256, (10, 16, 1), generator=draw), 8)
    assert few.values["group_entropy"].value < 7
    assert 7 < few.values["group_entropy_corrected"].value <= 8
    assert "160 tokens for 256 values" in few.notes["group_entropy"]
    assert few.values["mutual_information"].value < 0.02


def test_codebook__the_interval_holds_the_value_and_narrows_with_images() -> None:
    wide, narrow = (found_of(bits_to_indices(uneven_bits(n), 2), 2).values["bit_entropy"] for n in (12, 300))
    for one in (wide, narrow):
        assert one.low is not None and one.high is not None and one.low <= one.value <= one.high
    assert narrow.high - narrow.low < wide.high - wide.low  # type: ignore[operator]
    assert found_of(bits_to_indices(uneven_bits(1), 2), 2).values["bit_entropy"].low is None


def test_codebook__large_groups_are_left_out_and_a_note_says_so() -> None:
    found = found_of(torch.randint(0, 2**28, (3, 4, 1), generator=torch.Generator().manual_seed(0)), 28)
    assert "group_entropy" not in found.values and "more than 2^20 values" in found.notes["groups"]
    assert found.values["bit_entropy"].value > 0


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [(16, (64, 64), (4, 4)), (6, (32, 48), (2, 3)), (6, (48, 32), (3, 2)), (7, (64, 64), (1, 7))],
)
def test_codebook__tokens_lie_as_the_image_does(tokens: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    found = grid_of(tokens, size)
    assert found == grid or (tokens == 7 and found == (7, 1))


def test_codebook__what_cannot_be_measured_is_refused() -> None:
    model = Coded(torch.zeros(2, 4, 1, dtype=torch.int64), 1)
    model.group_size = None  # type: ignore[assignment]
    with pytest.raises(QLIPError, match="coded does not say how many bits an index has"):
        Codebook().check(model)
    with pytest.raises(QLIPError, match="above 0 and up to 1, got 2"):
        Codebook(tied=2)
    first, second = (
        Codebook().rows(ModelBatch(Coded(torch.zeros(2, n, 1, dtype=torch.int64), 8), batch_of(2))) for n in (4, 4)
    )
    second["shape"] = torch.tensor([[2, 2]] * 2)
    mixed = rows_of({name: torch.cat([first[name], second[name]]) for name in first})
    with pytest.raises(QLIPError, match=r"images of \(\d, \d\) and of \(\d, \d\)"):
        count(mixed, 8)


def test_codebook__an_image_is_drawn(tmp_path: Path) -> None:
    draw(found_of(bits_to_indices(uneven_bits(), 2), 2), tmp_path / "codebook.png")
    with Image.open(tmp_path / "codebook.png") as image:
        assert image.format == "PNG" and image.width > 3 * image.height / 2
    with pytest.raises(QLIPError, match="nothing to draw"):
        draw(MetricResult({}), tmp_path / "other.png")


def test_codebook__the_bundled_models_codes_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, 5, 64, seed=2)
    network, processor = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")
    model = QLIPEvalModel(network, processor, assets.BUNDLED)
    data = opened(tmp_path, model)
    evaluator = registry.evaluator("codebook")
    found = evaluate_dataset(model, data, [evaluator], batch_size=2)
    assert found is not None
    metric_result = found.metric_results["codebook"]
    pixels = torch.cat([batch.pixel_values for batch in data.batches(5)])
    with torch.inference_mode():
        bits = indices_to_bits(model.tokenize(pixels), network.group_size).flatten(0, 1)
    shares = bits.double().mean(0)
    expected = torch.nan_to_num(-(shares * shares.log2() + (1 - shares) * (1 - shares).log2()))
    torch.testing.assert_close(metric_result.arrays["bit_entropy"], expected, atol=1e-9, rtol=0)
    side = 64 // network.patch_size
    assert metric_result.arrays["position_entropy"].shape == (side, side)
