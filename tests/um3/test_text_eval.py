"""Bits per byte of texts against a loop over ids."""

from __future__ import annotations

import math

import pytest
import torch

from qlip.errors import QLIPError
from qlip.lm.causal import CausalModel
from qlip.lm.tokenizer import LLMTokenizer
from qlip.um3.config import UM3Config
from qlip.um3.model import UM3
from qlip.um3.text_eval import measure_texts
from tests.lm.tokenizers import made
from tests.um3.tiny import text_config

TEXTS = ["", "What colour is it?", "x", "ein roter Kreis \N{EURO SIGN} und mehr", "It is red.\n\nTwo."]


def model_of(kind: str, tokenizer: LLMTokenizer) -> CausalModel | UM3:
    torch.manual_seed(0)
    config = text_config(vocab_size=tokenizer.size)
    fields = {"begin_image": 5, "end_image": 6, "group_size": 3, "num_groups": 2, "grid": (2, 3), "softmax": kind}
    model = CausalModel(config) if kind == "text" else UM3.from_scratch(UM3Config.extend(config, **fields))
    for one in model.parameters():
        torch.nn.init.normal_(one, std=0.3)
    return model.eval()


def slow_bits(model: CausalModel | UM3, tokenizer: LLMTokenizer, text: str, window: int, stride: int) -> float:
    """Bits of a text, id by id, each with the context of the first window that reaches it."""
    decoder, rows = (model.decoder, model.config.visual_begin) if isinstance(model, UM3) else (model, None)
    if isinstance(model, UM3) and model.config.softmax == "joint":
        rows = None
    ids = tokenizer.encode(text, first=True)
    bits = 0.0
    if tokenizer.bos is None:
        bits = math.log2(tokenizer.size)
    else:
        ids = [tokenizer.bos, *ids]
    for place in range(1, len(ids)):
        begin = 0
        while place >= begin + window:
            begin += stride
        logits = decoder(torch.tensor([ids[begin:place]]))[0, -1, :rows].double()
        bits -= float(logits.log_softmax(0)[ids[place]]) / math.log(2)
    return bits


@pytest.mark.parametrize("family", ["smollm2", "llama2"])  # without and with a BOS
@pytest.mark.parametrize("kind", ["text", "separate", "joint"])
def test_measure_texts__equals_a_loop_over_ids(kind: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlip.um3.text_eval.AT_ONCE", 64)
    tokenizer = made(family)
    model = model_of(kind, tokenizer)
    for window, stride in ((16, 8), (16, 15), (5, 1)):
        with torch.inference_mode():
            wanted = sum(slow_bits(model, tokenizer, text, window, stride) for text in TEXTS if text)
        found = measure_texts(model, tokenizer, TEXTS, window=window, stride=stride)
        assert found.bits == pytest.approx(wanted, rel=1e-5)
        assert (found.num_documents, found.num_bytes) == (4, sum(len(text.encode()) for text in TEXTS))
        assert found.num_ids == sum(len(tokenizer.encode(text, first=True)) for text in TEXTS if text)
        assert found.first_bits == (0 if tokenizer.bos is not None else pytest.approx(4 * math.log2(tokenizer.size)))
        assert found.bits_per_byte == found.bits / found.num_bytes


def test_measure_texts__equal_ids_cost_the_logarithm_of_their_number() -> None:
    tokenizer = made("smollm2")
    model = model_of("separate", tokenizer)
    assert isinstance(model, UM3)
    torch.nn.init.zeros_(model.decoder.output_weight)
    found = measure_texts(model, tokenizer, TEXTS)
    assert found.bits == pytest.approx(found.num_ids * math.log2(tokenizer.size), rel=1e-5)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([""], {}, "there is no text to measure"),
        (["a"], {"window": 129}, "window 129: need 2 to 128, the model's context"),
        (["a"], {"window": 8, "stride": 8}, "stride 8: need 1 to 7"),
    ],
)
def test_measure_texts__faults(texts: list[str], settings: dict[str, int], message: str) -> None:
    tokenizer = made("smollm2")
    with pytest.raises(QLIPError, match=message):
        measure_texts(model_of("text", tokenizer), tokenizer, texts, **settings)
