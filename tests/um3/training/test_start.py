"""Models that a recipe of UM3 starts from: grown from a text decoder, with a given tokenizer, or a UM3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlip import QLIPError
from qlip.lm.causal import CausalModel
from qlip.lm.causal_config import CausalConfig
from qlip.lm.vocabulary import train_tokenizer
from qlip.training.recipe import check_recipe
from qlip.um3.model import UM3
from qlip.um3.training.recipe import UM3Recipe
from qlip.um3.training.start import open_start
from tests.um3.training.conftest import SIZES, train


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text decoder with two reserved tokens."""
    folder = tmp_path_factory.mktemp("llm") / "llm"
    tokenizer = train_tokenizer(["the sea was long"] * 3, 300, ("<reserved_0>", "<reserved_1>"))
    torch.manual_seed(1)
    CausalModel(CausalConfig.from_dict(SIZES | {"vocab_size": tokenizer.size})).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def start_of(values: dict[str, Any], **model: Any) -> Any:
    recipe = check_recipe(values | {"model": model}, "test")
    assert isinstance(recipe, UM3Recipe)
    return open_start(recipe, Path())


def test_grown__keeps_text_and_adds_rows_for_the_image_tokens(values: dict[str, Any], llm: Path) -> None:
    start, text = start_of(values, llm=str(llm)), CausalModel.from_pretrained(llm)
    rows, config = text.config.vocab_size, start.model.config
    assert (
        (config.begin_image, config.end_image)
        == (rows, rows + 1)
        == (
            start.tokenizer.token("<boi>"),
            start.tokenizer.token("<eoi>"),
        )
    )
    assert config.text_vocab_size == rows + 2 == start.tokenizer.size
    assert config.decoder.qk_norm is False and config.decoder.vocab_size == rows + 2 + 128
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(start.model.decoder(ids)[..., :rows], text(ids))


def test_grown__takes_reserved_tokens(values: dict[str, Any], llm: Path) -> None:
    names = ["<reserved_0>", "<reserved_1>"]
    start = start_of(values, llm=str(llm), image_tokens=names)
    assert start.model.config.text_vocab_size == CausalModel.from_pretrained(llm).config.vocab_size
    assert start.model.config.end_image == start.tokenizer.token(names[1])
    with pytest.raises(QLIPError, match="no token <pictured>"):
        start_of(values, llm=str(llm), image_tokens=["<reserved_0>", "<pictured>"])


def test_scratch__with_a_given_tokenizer(values: dict[str, Any], llm: Path) -> None:
    start = start_of(values, config=SIZES, tokenizer=str(llm), image_tokens=["<reserved_0>", "<reserved_1>"])
    assert start.model.config.text_vocab_size == start.tokenizer.size and start.model.config.decoder.qk_norm


def test_init__continues_a_um3(values: dict[str, Any], llm: Path, tmp_path: Path) -> None:
    first = train(values | {"model": {"llm": str(llm)}, "schedule": {"steps": 1}}, tmp_path / "one")
    start = start_of(values, init=str(first))
    before = UM3.from_pretrained(first)
    assert start.model.config == before.config and start.model.training
    assert all(torch.equal(one, before.state_dict()[name]) for name, one in start.model.state_dict().items())
    with pytest.raises(QLIPError, match="rows is used only with llm or config"):
        start_of(values, init=str(first), rows="per_group")
    with pytest.raises(QLIPError, match="is a UM3, not a text decoder; give it as model.init"):
        start_of(values, llm=str(first))


def test_grown__without_a_tokenizer_is_refused(values: dict[str, Any], llm: Path, tmp_path: Path) -> None:
    CausalModel.from_pretrained(llm).save_pretrained(tmp_path)
    with pytest.raises(QLIPError, match=r"has no tokenizer\.json"):
        start_of(values, llm=str(tmp_path))
