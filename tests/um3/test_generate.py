"""Continuation of text and images: cached, batched, guided steps give what full passes over masked logits give."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qlip.errors import QLIPError
from qlip.lm.guidance import Constant, Guidance, Linear
from qlip.lm.packed import pack
from qlip.lm.sampling import Sampling, uniforms
from qlip.um3.generate import SAMPLING, Mode, generate, stream
from qlip.um3.model import UM3
from qlip.um3.sequence import IN_TEXT
from tests.um3.tiny import BEGIN, END, document, tiny_config, tiny_um3

GREEDY = Sampling(temperature=0.0)
COST = tiny_config().image_length + 2
PROMPTS = [[1, 9, 27, 14], [1, 8], [1, 30, 31, 32, 20, 21]]
DRAWN = [1, 8, BEGIN]
"""A prompt whose image is begun."""


@torch.no_grad()
def recomputed(
    model: UM3, prompt: list[int], mode: Mode, count: int, sampling: Sampling, guidance: Guidance, number: int
) -> list[int]:
    """The slow twin: one sequence, full passes per id, one softmax over all ids behind a mask."""
    grammar, config = model.grammar, model.config
    ids = [*prompt, *([BEGIN] if mode == "image" else [])]
    given, state, begun = len(ids), grammar.start(), 0
    for place, id_ in enumerate(ids):
        begun, state = (place if id_ == BEGIN else begun), grammar.advance(state, id_)
    noise = uniforms(3, [number], count, 1)[0, :, 0]
    for step in range(count):
        logits = model.decoder(torch.tensor([ids]))[:, -1]
        if state != IN_TEXT:
            scale = guidance.scale(state // config.num_groups, config.num_tokens)
            bos = [config.decoder.bos_token_id] if ids[0] == config.decoder.bos_token_id else []
            null = model.decoder(torch.tensor([[*bos, *ids[begun:]]]))[:, -1]
            logits = null + scale * (logits - null) if scale > 1 else logits
        allowed = grammar.allowed(state, 0 if mode == "text" and state == IN_TEXT else count - step).ids()
        masked = torch.full_like(logits, -math.inf)
        masked[:, allowed] = logits[:, allowed]
        drawn = int(sampling.draw(masked, noise[step : step + 1]))
        begun, state = (len(ids) if drawn == BEGIN else begun), grammar.advance(state, drawn)
        ids.append(drawn)
        if drawn == (END if mode == "image" else config.decoder.eos_token_id):
            break
    return ids[given:]


def eager(bos: int | None) -> UM3:
    """A model that begins images often and seldom ends its text."""
    model = tiny_um3()
    decoder = model.config.decoder.model_copy(update={"bos_token_id": bos})
    model.config = model.config.model_copy(update={"decoder": decoder})
    with torch.no_grad():
        model.decoder.output_weight[BEGIN] *= 3
        model.decoder.output_weight[2] = -model.decoder.output_weight[BEGIN]
    return model


@pytest.fixture(scope="module")
def model() -> UM3:
    return eager(bos=1)


@pytest.mark.parametrize("bos", [1, None])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("mode", "count", "guidance"),
    [
        ("text", 20, Constant(1.0)),
        ("image", COST - 1, Constant(1.0)),
        ("image", COST - 1, Linear(1.0, 4.0)),
        ("interleaved", 60, Constant(3.0)),
    ],
)
def test_generate__is_what_full_passes_give(
    mode: Mode, count: int, guidance: Guidance, sampling: Sampling, bos: int | None
) -> None:
    model = eager(bos)
    expected = [recomputed(model, one, mode, count, sampling, guidance, number) for number, one in enumerate(PROMPTS)]
    options: dict[str, Any] = {"sampling": sampling, "guidance": guidance, "max_tokens": count, "seed": 3}
    assert generate(model, PROMPTS, generation_mode=mode, **options) == expected
    if mode == "interleaved":
        assert sum(row.count(BEGIN) for row in expected) > 2, "nothing is tested"
    [alone] = generate(model, PROMPTS[2:], generation_mode=mode, numbers=[2], **options)
    assert alone == expected[2]


def test_generate__packed_on_a_cpu_draws_the_same_ids(model: UM3) -> None:
    fast = copy.deepcopy(model)
    pack(fast.decoder, "float32" if torch.backends.mkldnn.is_available() else "plain")
    options: dict[str, Any] = {"guidance": Constant(2.0), "seed": 1, "max_tokens": 40}
    assert generate(fast, PROMPTS, **options) == generate(model, PROMPTS, **options)


def test_generate__rows_of_groups_of_their_own() -> None:
    model = tiny_um3(rows="per_group")
    [image] = generate(model, [[1, 8]], generation_mode="image", guidance=Constant(2.0))
    assert image[-1] == END and len(image) == COST - 1
    for place, id_ in enumerate(image[:-1]):
        begin, end = model.config.group_rows(place % 2)
        assert begin <= id_ < end


def test_generate__any_ids_are_a_whole_document(model: UM3) -> None:
    for mode in ("text", "interleaved"):
        for prompt, new in zip(PROMPTS, generate(model, PROMPTS, generation_mode=mode, max_tokens=50), strict=True):
            model.grammar.check(torch.tensor([*prompt, *new]))
            assert mode == "interleaved" or BEGIN not in new


def test_generate__continues_the_image_of_a_prompt(model: UM3) -> None:
    config = model.config
    whole = document(config, [[1, 8], 7])  # ends with the image's end
    for guidance in (Constant(1.0), Constant(3.0)):
        cut = whole[: 3 + 5]
        expected = recomputed(model, cut, "interleaved", 30, GREEDY, guidance, 0)
        assert expected[config.image_length - 5] == END
        found = generate(model, [cut], sampling=GREEDY, guidance=guidance, max_tokens=30, seed=3)
        assert found == [expected]


def test_stream__a_cache_gives_what_a_new_one_gives(model: UM3) -> None:
    """A conversation goes on behind what its cache holds, with guidance and without."""
    guidance = Constant(3.0)
    cache = model.decoder.new_cache(2, 128)
    prompt = PROMPTS[0]
    for turn in ([], [9, 33], [12]):
        prompt = [*prompt, *turn]
        options: dict[str, Any] = {"guidance": guidance, "seed": len(prompt), "max_tokens": 30}
        expected = generate(model, [prompt], **options)[0]
        found = [int(one) for one in stream(model, [prompt], cache=cache, **options)]
        assert found == expected
        prompt = [*prompt, *found]
        assert cache.length >= len(prompt) - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_mode": "picture"}, "give text, image, interleaved"),
        ({"max_tokens": 13}, "max_tokens 13 cannot hold an image, which has 14 ids with its begin and end; give more"),
        ({"max_tokens": 12, "generation_mode": "image"}, "cannot hold an image, which has 13 ids"),
        ({"max_tokens": 0}, "max_tokens 0"),
    ],
)
def test_generate__settings_that_cannot_be_met_are_one_line(model: UM3, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        generate(model, [[1, 8]], **options)


@pytest.mark.parametrize(
    ("prompts", "mode", "message"),
    [
        ([[1], []], "text", "an empty prompt"),
        ([[1], [1, 99]], "text", "prompt 1, position 1: id 99 is none of the 48"),
        ([[1, 45]], "text", "the prompt, position 1: id 45, a visual id, stands outside an image"),
        ([[*DRAWN, 41, 8]], "text", "cuts an image short"),
        ([DRAWN], "image", "position 3: id 5, one of text, cuts an image short"),
        ([[1] * 115], "image", "a prompt of 115 ids and an image of 14 .* do not fit in the context of 128"),
        ([[1] * 128], "text", "128 ids fill the context of 128"),
    ],
)
def test_generate__prompts_that_cannot_be_continued_are_one_line(
    model: UM3, prompts: Sequence[list[int]], mode: Mode, message: str
) -> None:
    with pytest.raises(QLIPError, match=message):
        generate(model, prompts, generation_mode=mode)


def test_generate__a_budget_that_cannot_end_the_prompts_image_is_one_line(model: UM3) -> None:
    with pytest.raises(QLIPError, match=r"the image in the prompt needs 13 more ids"):
        generate(model, [DRAWN], generation_mode="text", max_tokens=12)
