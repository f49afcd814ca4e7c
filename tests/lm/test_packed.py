"""Packed decoders: equal to plain ones, rows independent of the batch, int8 within its error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qlip.errors import QLIPError
from qlip.lm.cache import KVCache
from qlip.lm.conditions import Condition
from qlip.lm.generate import generate
from qlip.lm.guidance import Constant
from qlip.lm.heads import FlatHead
from qlip.lm.model import DecoderModel
from qlip.lm.packed import PackedLinear, Weights, pack
from qlip.lm.sampling import Sampling
from qlip.lm.transformer import DecoderLayers, causal_mask
from tests.lm.llamagen import CACHED, Fixture
from tests.lm.test_model import HEADS, conditions, randomized, some_indices, tiny

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("weights", ["float32", "plain"])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "num_key_value_heads": 1, "rotary": "1d"}])
@torch.no_grad()
def test_packed__equals_the_model(kind: str, weights: Weights, changes: dict[str, Any]) -> None:
    config = tiny(head=kind, condition="tokens", prefix_length=4, **changes)
    model, indices, condition = randomized(config), some_indices(config), conditions(config)
    fast = pack(copy.deepcopy(model), weights)
    torch.testing.assert_close(fast(indices, condition), model(indices, condition), atol=2e-5, rtol=0)
    options = {"guidance": Constant(2.0), "seed": 4, "images_per_condition": 2}
    assert torch.equal(generate(fast, condition, **options), generate(model, condition, **options))


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_packed__draws_llamagens_greedy_tokens(name: str) -> None:
    fixture = Fixture(name)
    drawn = generate(pack(fixture.model), fixture.condition, sampling=Sampling(temperature=0.0), guidance=Constant(4.0))
    assert torch.equal(drawn[..., 0], fixture.outputs["greedy.cfg4.tokens"])


@pytest.mark.parametrize("channels", [192, 768, 1024])
def test_row__does_not_depend_on_the_batch(channels: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(3 * channels, channels), torch.randn(300, channels)
    layer = PackedLinear(weight)
    together = layer(x)
    for count in (1, 2, 3, 8, 64):
        assert torch.equal(layer(x[:count].contiguous()), together[:count])
    torch.testing.assert_close(together, x @ weight.T, atol=1e-4, rtol=1e-5)


def nano(**changes: Any) -> DecoderModel:
    sizes = {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 512, "codebook_size": 128}
    config = tiny(**{**sizes, "head": "chain", **changes})
    torch.manual_seed(0)
    model = DecoderModel(config).eval()
    for weight in model.head.last_layers():
        torch.nn.init.normal_(weight, std=0.1)
    return model


@torch.inference_mode()
def test_cached_states__of_a_packed_nano_are_bit_equal_in_any_batch() -> None:
    model = pack(nano())
    x = torch.randn(8, 1, 192)
    caches = [KVCache(model.config, rows) for rows in (8, 1)]
    for _ in range(4):
        together, alone = (model.run(x[: cache.rows], cache=cache) for cache in caches)
        assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "num_key_value_heads": 2}])
@torch.inference_mode()
def test_step__of_packed_layers_is_bit_equal_to_the_blocks(changes: dict[str, Any]) -> None:
    model = pack(nano(**changes))
    x, start = torch.randn(3, 5, 192), torch.tensor([0, 2, 1])
    stepped, plain = KVCache(model.config, 3), KVCache(model.config, 3)
    stepped.start = plain.start = start
    for at in range(5):
        new, table = x[:, at : at + 1], model.rotary()[at : at + 1]
        expected = DecoderLayers.run(model.layers, new, table, causal_mask(1, at, start, x.dtype, x.device), plain)
        plain.advance(1)
        assert torch.equal(model.run(new, cache=stepped), model.norm(expected))
        assert torch.equal(stepped.stored, plain.stored)
    with pytest.raises(QLIPError, match="7 positions do not fit a cache of 6"):
        model.run(torch.randn(3, 1, 192), cache=shortened(stepped))


def shortened(cache: KVCache) -> KVCache:
    cache.stored, cache.length = cache.stored[..., :6, :], 6
    return cache


@torch.inference_mode()
def test_flat_head__logits_of_a_group_are_bit_equal_in_any_batch() -> None:
    head, x = pack(nano(head="flat")).head, torch.randn(8, 192)
    assert isinstance(head, FlatHead)
    for step in range(4):
        assert torch.equal(head.step_logits(x, step)[:1], head.step_logits(x[:1], step))


@torch.no_grad()
def test_int8__changes_the_likelihood_little() -> None:
    model = nano()
    indices, condition = some_indices(model.config, 4), Condition(torch.arange(4))
    bits, fast = model.bits_per_image(indices, condition), pack(copy.deepcopy(model), "int8")
    changed = fast.bits_per_image(indices, condition)
    assert 0 < float((changed - bits).abs().max()) < 0.01 * float(bits.mean())


def test_pack__of_what_it_cannot_is_one_line() -> None:
    with pytest.raises(QLIPError, match="need float32 weights on a CPU, not bfloat16 on cpu"):
        pack(DecoderModel(tiny()).bfloat16())
    with pytest.raises(QLIPError, match="on meta"):
        pack(DecoderModel(tiny()).to("meta"))
    with pytest.raises(QLIPError, match="give float32 or int8 or plain"):
        pack(DecoderModel(tiny()), "int4")  # type: ignore[arg-type]
    packed = pack(DecoderModel(tiny()))
    assert not any(one.requires_grad for one in packed.parameters())


def test_pack__without_onednn_takes_plain_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(QLIPError, match="give weights plain"):
        pack(DecoderModel(tiny()))
    assert not any(isinstance(one, PackedLinear) for one in pack(DecoderModel(tiny()), "plain").modules())


def test_packed__is_not_compiled() -> None:
    with pytest.raises(QLIPError, match="a packed decoder cannot be compiled"):
        generate(pack(DecoderModel(tiny())), Condition(torch.arange(2)), compile=True)


def test_packed__is_not_saved(tmp_path: Any) -> None:
    with pytest.raises(QLIPError, match="packed"):
        pack(DecoderModel(tiny())).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
