"""UM3: starts of its visual rows, its two softmaxes, its folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.lm.causal import CausalModel
from qlip.um3.config import UM3Config, is_um3
from qlip.um3.model import STARTS, UM3, param_groups, z_loss
from qlip.um3.sequence import IGNORED, TEXT
from tests.um3.tiny import document, text_config, tiny_config, tiny_um3

TIED = pytest.mark.parametrize("tied", [True, False])
ROWS = pytest.mark.parametrize("rows", ["shared", "per_group"])


@dataclass
class Batch:
    ids: Tensor
    documents: Tensor
    positions: Tensor


def batch(config: UM3Config) -> Batch:
    """Two rows: two documents and padding, and one with two images."""
    rows = [[document(config, [[7, 8], 0, [9, 2]]), document(config, [[11], 1])], [document(config, [2, [7], 3, [8]])]]
    ids, documents, positions = (torch.zeros(2, 40, dtype=torch.int64) for _ in range(3))
    documents -= 1
    for row, parts in enumerate(rows):
        begin = 0
        for number, part in enumerate(parts):
            place = slice(begin, begin := begin + len(part))
            ids[row, place], documents[row, place] = torch.tensor(part), number
            positions[row, place] = torch.arange(len(part))
    return Batch(ids, documents, positions)


def text_model(tied: bool = False) -> CausalModel:
    torch.manual_seed(3)
    model = CausalModel(text_config(tie_word_embeddings=tied))
    for one in model.parameters():
        torch.nn.init.normal_(one, 0.1, 0.3)
    return model.eval()


# ---------------------------------------------------------------- rows


@TIED
@ROWS
@torch.no_grad()
def test_grown__with_mean_rows_predicts_all_values_alike(tied: bool, rows: str) -> None:
    model = UM3.grown(text_model(tied), tiny_config(tied, rows=rows))
    data = batch(model.config)
    types = model.grammar.target_types(data.ids, data.documents)
    nats = model(data)
    assert nats.shape == data.ids.shape and nats.dtype == torch.float32
    torch.testing.assert_close(nats[types > TEXT], torch.full((48,), 3 * math.log(2)), atol=2e-6, rtol=0)
    assert (nats[types == IGNORED] == 0).all() and (nats[types == TEXT] > 0).all()


@TIED
@pytest.mark.parametrize("start", STARTS)
@torch.no_grad()
def test_grown__keeps_the_logits_of_text_to_the_bit(tied: bool, start: Any) -> None:
    text = text_model(tied)
    before = {name: one.clone() for name, one in text.state_dict().items()}
    model = UM3.grown(text, tiny_config(tied), start)
    ids = torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.decoder(ids)[..., :40], text(ids))
    model.decoder.tok_embeddings.weight.zero_()
    assert all(torch.equal(one, before[name]) for name, one in text.state_dict().items())


@ROWS
def test_rows__of_bits_are_sums_of_two_vectors_per_bit(rows: str) -> None:
    weight = UM3.grown(text_model(), tiny_config(rows=rows), "bits").decoder.tok_embeddings.weight.detach()
    for values in weight[40:].split(8):
        for bit in (1, 2, 4):  # flipping a bit changes every row by the same vector
            others = [value for value in range(8) if not value & bit]
            change = torch.stack([values[value | bit] - values[value] for value in others])
            torch.testing.assert_close(change, change[:1].expand_as(change))
            assert change.abs().min(1).values.max() > 0
    if rows == "per_group":
        assert not torch.equal(weight[40:48], weight[48:])


def test_rows__start_with_the_mean_and_deviation_of_the_text_rows() -> None:
    text = text_model()
    rows = text.tok_embeddings.weight.detach()
    for start in ("random", "bits"):
        config = tiny_config(group_size=9, num_groups=1)
        found = torch.stack([UM3.grown(text, config, start, seed).decoder.output_weight[40:] for seed in range(12)])  # type: ignore[arg-type]
        assert not torch.equal(found[0], found[1])
        own = UM3.grown(text, config, start, 1).decoder.output_weight[40:]  # type: ignore[arg-type]
        assert torch.equal(own, found[1])
        expected = text.output_weight.detach()
        torch.testing.assert_close(found.mean((0, 1)), expected.mean(0), atol=0.15, rtol=0)
        torch.testing.assert_close(found.std((0, 1)).mean(), expected.std(0).mean(), atol=0.03, rtol=0)
    with pytest.raises(QLIPError, match="start 'zero': need mean, random, bits"):
        UM3.grown(text, tiny_config(), "zero")  # type: ignore[arg-type]
    assert rows.shape == (40, 16)


def test_grown__new_text_rows_start_at_the_mean() -> None:
    text = text_model(True)
    config = tiny_config(True, text_vocab_size=42, begin_image=40, end_image=41)
    weight = UM3.grown(text, config).decoder.output_weight
    mean = text.output_weight.mean(0)
    assert weight.shape == (50, 16) and torch.equal(weight[:40], text.output_weight)
    torch.testing.assert_close(weight[40:], mean.expand(10, -1))


def test_from_scratch__mean_rows_are_the_mean() -> None:
    weight = UM3.from_scratch(tiny_config()).decoder.output_weight
    torch.testing.assert_close(weight[40:], weight[:40].mean(0).expand(8, -1))


# ---------------------------------------------------------------- softmaxes


@TIED
@ROWS
@pytest.mark.parametrize("softmax", ["separate", "joint"])
def test_forward__is_the_plain_softmax_forward_and_backward(tied: bool, rows: str, softmax: str) -> None:
    model = tiny_um3(tied, rows=rows, softmax=softmax)
    data, config = batch(model.config), model.config
    types = model.grammar.target_types(data.ids, data.documents)
    logits = model.decoder(data.ids, data.positions, data.documents).roll(1, 1)  # at the places of targets
    if softmax == "separate":
        hidden = torch.full_like(logits, float("-inf"))
        for kind in types.unique().tolist():
            begin, end = (0, 40) if kind <= TEXT else config.group_rows(kind - 1)
            hidden[..., begin:end] = torch.where((types == kind)[..., None], 0.0, hidden[..., begin:end])
        logits = logits + hidden
    used = types != IGNORED
    plain = F.cross_entropy(logits[used], data.ids[used], reduction="none")
    norm = logits[used].logsumexp(-1)
    weights = torch.rand(int(used.sum()), generator=torch.Generator().manual_seed(0))
    nats, norms = model(data, norms=True)
    assert torch.equal(nats, model(data)) and (nats[~used] == 0).all() and (norms[~used] == 0).all()
    torch.testing.assert_close(nats[used], plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norms[used], norm, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    for ours, theirs in ((nats, plain), (z_loss(norms), norm**2), (nats + z_loss(norms), plain + norm**2)):
        found = torch.autograd.grad((ours[used] * weights).sum(), parameters, retain_graph=True)
        expected = torch.autograd.grad((theirs * weights).sum(), parameters, retain_graph=True)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_separate_softmax__does_not_compare_text_and_images() -> None:
    model = tiny_um3()
    data = batch(model.config)
    types = model.grammar.target_types(data.ids, data.documents)
    visual = torch.autograd.grad(model(data)[types > TEXT].sum(), model.decoder.output_weight)[0]
    text = torch.autograd.grad(model(data)[types == TEXT].sum(), model.decoder.output_weight)[0]
    assert (visual[:40] == 0).all() and (text[40:] == 0).all()
    assert (visual[40:].abs().sum(1) > 0).all() and (text[:40].abs().sum(1) > 0).all()


# ---------------------------------------------------------------- folders


@TIED
@ROWS
def test_folder__is_a_stock_decoder_and_loads_again(tied: bool, rows: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_um3(tied, rows=rows, vision_fingerprint="abc", softmax="joint")
    model.save_pretrained(tmp_path)
    assert is_um3(tmp_path)
    again = UM3.from_pretrained(tmp_path)
    data = batch(model.config)
    assert again.config.model_copy(update={"decoder": model.config.decoder}) == model.config
    assert torch.equal(again(data), model(data))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.config.model_type == "qwen3" and stock.config.vocab_size == model.config.decoder.vocab_size
    ids = data.ids[1:, :20]
    torch.testing.assert_close(stock(ids).logits, model.decoder(ids), atol=1e-5, rtol=0)


def test_folder__of_other_weights_of_the_same_names(tmp_path: Path) -> None:
    model = tiny_um3()
    state = {name: one + 1 for name, one in model.state_dict().items()}
    model.save_pretrained(tmp_path, torch.bfloat16, state)
    found = UM3.from_pretrained(tmp_path, dtype="bfloat16").state_dict()
    assert all(torch.equal(one, state[name].bfloat16()) for name, one in found.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end_image": 5}, "begin_image 5 and end_image 5: need two of the 40 text rows"),
        ({"begin_image": 40}, "begin_image 40 and end_image 6: need two of the 40 text rows"),
        ({"text_vocab_size": 41}, "41 text rows and 8 visual ones are 49, but the decoder's vocab_size is 48"),
        (
            {"grid": [8, 8]},
            "an image of 64 x 2 ids with its begin and end does not fit in the decoder's context of 128",
        ),
        ({"softmaxes": 2}, "unknown key 'softmaxes'"),
    ],
)
def test_folder__whose_um3_json_does_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny_um3().save_pretrained(tmp_path)
    path = tmp_path / "um3.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(QLIPError, match=message) as caught:
        UM3.from_pretrained(tmp_path)
    assert "um3.json" in str(caught.value) and "\n" not in str(caught.value)


def test_folder__of_a_text_decoder_is_no_um3(tmp_path: Path) -> None:
    text_model().save_pretrained(tmp_path)
    assert not is_um3(tmp_path)
    with pytest.raises(QLIPError, match=r"holds a text decoder, but no um3.json; it is no UM3 yet"):
        UM3.from_pretrained(tmp_path)
    for text in ("[1]", "{", ""):
        (tmp_path / "um3.json").write_text(text)
        with pytest.raises(QLIPError, match="um3.json: not "):
            UM3.from_pretrained(tmp_path)


def test_grown__refuses_a_decoder_of_another_width() -> None:
    config = tiny_config()
    for tied in (False, True):
        wider = CausalModel(text_config(hidden_size=32, tie_word_embeddings=tied))
        with pytest.raises(QLIPError, match="the text decoder has hidden_size 32, the UM3's config 16"):
            UM3.grown(wider, config)
    with pytest.raises(QLIPError, match="tie_word_embeddings True, the UM3's config False"):
        UM3.grown(text_model(True), config)
    with pytest.raises(QLIPError, match="text_vocab_size 30: the text decoder has 40 rows; all are kept"):
        tiny_config(text_vocab_size=30)


def test_param_groups__embeddings_and_norms_do_not_decay() -> None:
    model = tiny_um3()
    groups = param_groups(model)
    kept = {name for name, _ in model.named_parameters() if not groups.decays(name)}
    assert {name for name in kept if "norm" not in name} == {"decoder.tok_embeddings.weight"}
    assert {groups.part(name) for name, _ in model.named_parameters()} == {"model"}
