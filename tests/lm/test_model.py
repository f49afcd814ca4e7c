"""The decoder against LlamaGen's numbers, a literal twin, and properties of its loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlip.errors import QLIPError
from qlip.lm.conditions import Condition
from qlip.lm.config import SIZES, DecoderConfig
from qlip.lm.model import DecoderModel, param_groups
from qlip.modeling.transformer import Block
from tests.lm.llamagen import FOLDER, MODELS, Fixture

TOLERANCE = 2e-5
HEADS = ("flat", "parallel", "chain", "depth", "bits", "masked_bits")


def tiny(**changes: Any) -> DecoderConfig:
    """3 x 2 tokens of 3 groups of 2 bits."""
    values: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "grid": (3, 2),
        "codebook_size": 4,
        "num_groups": 3,
        "condition_size": 5,
    }
    if "head" in changes:
        changes["head"] = head(changes["head"])
    return DecoderConfig.from_dict(values | changes)


def head(kind: str) -> dict[str, Any]:
    more = {"depth": {"num_layers": 2, "num_attention_heads": 2}, "masked_bits": {"rounds": 2}}
    return {"kind": kind} | more.get(kind, {})


def randomized(config: DecoderConfig, seed: int = 0) -> DecoderModel:
    """A model in eval mode whose head is not zero."""
    torch.manual_seed(seed)
    model = DecoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def some_indices(config: DecoderConfig, count: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.codebook_size, (count, config.num_tokens, config.num_groups), generator=generator)


def conditions(config: DecoderConfig, count: int = 3) -> Condition:
    if config.condition == "class":
        return Condition(torch.arange(count) % config.condition_size)
    mask = torch.arange(config.prefix_length) < torch.arange(1, count + 1)[:, None]
    if config.condition == "tokens":
        ids = torch.arange(count * config.prefix_length).reshape(count, -1) % config.condition_size
        return Condition(ids, mask)
    torch.manual_seed(5)
    return Condition(torch.randn(count, config.prefix_length, config.condition_size), mask)


# ---------------------------------------------------------------- LlamaGen


@pytest.mark.parametrize("name", MODELS)
def test_model__agrees_with_llamagen(name: str) -> None:
    fixture = Fixture(name)
    model, expected, condition = fixture.model, fixture.outputs, fixture.condition
    torch.testing.assert_close(model.rotary(), expected["rope.table"], atol=1e-6, rtol=0)
    prefix, hidden_states = model.condition(condition), list[Tensor]()
    hidden = model.hidden(fixture.indices, prefix, hidden_states=hidden_states)
    found = {
        "embeddings.condition": prefix.embeddings,
        "embeddings.condition_dropped_0_2": model.condition(condition, torch.tensor([True, False, True])).embeddings,
        "logits": model.head.output(hidden),
        "logits.uncond": model.head.output(
            model.hidden(fixture.indices, model.condition(model.condition.null(condition)))
        ),
    }
    found |= {f"hidden.{number}": one for number, one in enumerate(hidden_states)}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients__agree_with_llamagen(name: str) -> None:
    fixture = Fixture(name)
    model, expected = fixture.model, fixture.outputs
    nats = model(fixture.indices, fixture.condition)[..., 0]
    valid = fixture.inputs.get("valid", torch.ones(len(nats))).float()[:, None]
    loss = (nats * valid).sum() / (valid.sum() * nats.shape[1])
    torch.testing.assert_close(loss[None], expected["loss"], atol=TOLERANCE, rtol=0)
    loss.backward()
    ours = {theirs: name for name, theirs in fixture.names.items()}
    for name, parameter in model.named_parameters():
        theirs = ours.get(name, name)
        assert parameter.grad is not None
        assert float(parameter.grad.norm()) == pytest.approx(fixture.values["gradient_norms"][theirs], abs=1e-4)
        if f"grad.{theirs}" in expected:
            torch.testing.assert_close(parameter.grad, expected[f"grad.{theirs}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "classes", "features"),
    [
        ("LlamaGen-B", 110_888_448, 112_282_368),
        ("LlamaGen-L", 342_910_976, 345_031_680),
        ("LlamaGen-XL", 774_699_520, 777_678_080),
        ("LlamaGen-XXL", 1_410_972_672, 1_414_940_160),
        ("LlamaGen-XXXL", 3_893_027_840, 3_902_261_760),
        ("LlamaGen-1B", 1_199_616_000, 1_205_954_560),
        ("LlamaGen-3B", 3_096_659_200, 3_110_249_600),
        ("LlamaGen-7B", 6_614_589_440, 6_635_655_168),
    ],
)
def test_sizes__have_llamagens_number_of_parameters(name: str, classes: int, features: int) -> None:
    assert name in SIZES
    with torch.device("meta"):
        assert DecoderModel(DecoderConfig.named(name)).num_parameters() == classes
        assert DecoderModel(DecoderConfig.named(name, condition="features")).num_parameters() == features


@pytest.mark.parametrize(("name", "side"), [("LlamaGen-B", 16), ("LlamaGen-XL", 16), ("LlamaGen-3B", 24)])
def test_rotary__agrees_with_llamagen_at_real_sizes(name: str, side: int) -> None:
    from safetensors.torch import load_file

    from qlip.lm.rotary import rotary_table

    rows = load_file(FOLDER / "sampling" / "rope_rows.safetensors")
    tag = {"LlamaGen-B": "B_256", "LlamaGen-XL": "XL_t2i_256", "LlamaGen-3B": "3B_384"}[name]
    text = {"condition": "features"} if "t2i" in tag else {}
    table = rotary_table(DecoderConfig.named(name, grid=(side, side), **text))
    torch.testing.assert_close(table[rows[f"{tag}.rows"]], rows[f"{tag}.table"], atol=1e-6, rtol=0)


# ---------------------------------------------------------------- every head


@pytest.mark.parametrize("kind", HEADS)
def test_first_loss__is_that_of_uniform_values(kind: str) -> None:
    config = tiny(head=kind)
    nats = DecoderModel(config)(some_indices(config), conditions(config))
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, torch.full_like(nats, math.log(4)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", HEADS)
def test_likelihood__of_all_images_sums_to_one(kind: str) -> None:
    config = tiny(head=kind, grid=(1, 2), codebook_size=2, num_groups=2)
    model = randomized(config).requires_grad_(False)
    images = torch.cartesian_prod(*[torch.arange(2)] * 4).reshape(16, 2, 2)
    for label in range(2):
        nats = model(images, Condition(torch.full((16,), label))).sum((1, 2))
        assert float(nats.neg().exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_loss__reads_nothing_that_comes_later(kind: str) -> None:
    config = tiny(head=kind)
    model, indices = randomized(config), some_indices(config)
    before = model(indices, conditions(config))
    changed = indices.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 4
    after = model(changed, conditions(config))
    torch.testing.assert_close(after[:, :3], before[:, :3], atol=0, rtol=0)
    assert not torch.allclose(after[:, 4:], before[:, 4:])
    last = indices.clone()
    last[:, 3, -1] = (last[:, 3, -1] + 1) % 4  # the last group of a token decides over no earlier one of it
    if kind not in ("bits", "masked_bits"):
        torch.testing.assert_close(model(last, conditions(config))[:, 3, :-1], before[:, 3, :-1], atol=0, rtol=0)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("condition", ["class", "features", "tokens"])
def test_gradients__reach_every_parameter(kind: str, condition: str) -> None:
    length = 1 if condition == "class" else 4
    config = tiny(head=kind, condition=condition, prefix_length=length, qk_norm=True, num_key_value_heads=1)
    model = randomized(config).train()
    model(some_indices(config), conditions(config)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", HEADS)
def test_loss__per_sample_is_the_batchs(kind: str) -> None:
    """Padding and the batch change nothing."""
    config = tiny(head=kind, condition="tokens", prefix_length=4, rotary="1d")
    model, indices, condition = randomized(config), some_indices(config), conditions(config)
    together = model(indices, condition)
    assert condition.mask is not None
    for number in range(3):
        count = number + 1
        alone = Condition(condition.values[number:count, :count])
        torch.testing.assert_close(model(indices[number:count], alone)[0], together[number], atol=1e-5, rtol=0)


def test_random_order__predicts_each_place_once() -> None:
    config = tiny(head="chain", target_positions=True)
    model, indices = randomized(config), some_indices(config)
    raster = torch.arange(6).expand(3, -1)
    condition = conditions(config)
    torch.testing.assert_close(model(indices, condition, order=raster), model(indices, condition), atol=1e-5, rtol=0)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    nats = model(indices, condition, order=order)
    first = order[0, 0]
    changed = indices.clone()
    changed[0, order[0, 3:]] = (changed[0, order[0, 3:]] + 1) % 4
    after = model(changed, condition, order=order)
    torch.testing.assert_close(after[0, order[0, :3]], nats[0, order[0, :3]], atol=1e-6, rtol=0)
    assert not torch.allclose(nats[0, first], model(indices, condition)[0, first])
    with pytest.raises(QLIPError, match="target_positions"):
        randomized(tiny())(indices, condition, order=order)


def test_noisy_inputs__keep_the_targets() -> None:
    config = tiny(head="parallel")
    model, indices = randomized(config), some_indices(config)
    noisy = indices.clone()
    noisy[:, 2] = (noisy[:, 2] + 1) % 4
    nats = model(indices, conditions(config), inputs=noisy)
    torch.testing.assert_close(nats[:, :3], model(indices, conditions(config))[:, :3], atol=0, rtol=0)
    assert not torch.allclose(nats[:, 3:], model(indices, conditions(config))[:, 3:])


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 1}, {"qk_norm": True}, {"head_dim": 12}])
def test_block__equals_a_literal_one(changes: dict[str, Any]) -> None:
    """Attention of each position and head by itself, in float64."""
    config = tiny(**changes)
    model = randomized(config).double()
    x, table = torch.randn(2, 5, 16, dtype=torch.float64), model.rotary()[:5]
    layer = model.layers[0]
    torch.testing.assert_close(layer(x, table), literal_block(layer, config, x, table), atol=1e-6, rtol=0)


def literal_block(layer: Any, config: DecoderConfig, x: Tensor, table: Tensor) -> Tensor:
    def norm(one: Tensor, weight: Tensor) -> Tensor:
        return one / (one.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turned(one: Tensor, position: int) -> Tensor:
        found = one.clone()
        for pair in range(len(one) // 2):
            cos, sin = table[position, pair]
            a, b = one[2 * pair], one[2 * pair + 1]
            found[2 * pair], found[2 * pair + 1] = a * cos - b * sin, b * cos + a * sin
        return found

    width, attention = config.head_width, layer.attention
    found = torch.empty_like(x)
    for sample in range(len(x)):
        rows = norm(x[sample], layer.attention_norm.weight) @ attention.wqkv.weight.T
        q, k, v = rows.split(attention.sizes, 1)
        q, k, v = (one.unflatten(1, (-1, width)) for one in (q, k, v))
        if config.qk_norm:
            q, k = norm(q, attention.q_norm.weight), norm(k, attention.k_norm.weight)
        merged = torch.empty_like(q)
        for head_ in range(config.num_attention_heads):
            source = head_ * config.kv_heads // config.num_attention_heads
            for here in range(len(rows)):
                scores = torch.stack(
                    [turned(q[here, head_], here) @ turned(k[at, source], at) for at in range(here + 1)]
                )
                weights = (scores / width**0.5).softmax(0)
                merged[here, head_] = weights @ v[: here + 1, source]
        h = x[sample] + merged.flatten(1) @ attention.wo.weight.T
        fed = norm(h, layer.ffn_norm.weight)
        w = layer.feed_forward
        gate = fed @ w.w1.weight.T
        found[sample] = h + (gate * gate.sigmoid() * (fed @ w.w3.weight.T)) @ w.w2.weight.T
    return found


class _Largest(TorchDispatchMode):
    """Numbers in the largest float32 tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out


def test_loss__never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlip.lm.cross_entropy.MAX_LOGITS", 4096)
    config = tiny(head="parallel", grid=(8, 8), codebook_size=512, num_groups=1)
    model, indices = DecoderModel(config), some_indices(config, 4)
    with _Largest() as largest:
        model(indices, conditions(config, 4)).mean().backward()
    assert largest.numel < 4 * 64 * 512 / 8


def test_blocks__are_what_training_shards() -> None:
    config = tiny(head="depth")
    model = DecoderModel(config)
    assert sum(isinstance(one, Block) for one in model.modules()) == 2 + 2
    groups = param_groups(model)
    names = [name for name, _ in model.named_parameters()]
    decaying = {name for name in names if groups.decays(name)}
    assert "layers.0.attention.wqkv.weight" in decaying and "head.output.weight" in decaying
    assert not any("norm" in name or "embedding" in name for name in decaying)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 2"),
        ({"hidden_size": 15}, "num_attention_heads 2 does not divide hidden_size 15"),
        ({"head_dim": 6}, "multiple of 4"),
        ({"rotary": "frequencies"}, "rotary_frequencies"),
        ({"rotary": "axial"}, "prefix_rotary"),
        ({"prefix_length": 3}, "a class is one position"),
        ({"head": "bits", "codebook_size": 5}, "power of two"),
        ({"head": "flat", "target_positions": True}, "a step per token"),
        ({"widht": 3}, "unknown key 'widht'"),
        ({"num_hidden_layers": True}, "must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ],
)
def test_config__that_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QLIPError, match=message) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


def test_head_settings__of_another_head_are_refused() -> None:
    with pytest.raises(QLIPError, match="rounds is used only with kind masked_bits"):
        DecoderConfig.from_dict(tiny().to_dict() | {"head": {"kind": "chain", "rounds": 2}})


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(1, 6, 2, dtype=torch.int64), "this decoder reads .B, 6, 3."),
        (torch.zeros(1, 6, 3), "int64"),
        (torch.full((1, 6, 3), 4), "index 4 is out of range: 0 to 3"),
    ],
)
def test_indices__that_do_not_fit_are_refused(indices: Tensor, message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        DecoderModel(tiny())(indices, Condition(torch.tensor([0])))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Condition(torch.arange(6)[None] % 5), "a caption of 6 positions is longer than the prefix, 4"),
        (Condition(torch.tensor([[7]])), "id 7 is out of range"),
        (Condition(torch.tensor([[6]])), "id 6 is out of range"),  # 5 is the null condition
        (Condition(torch.tensor([0])), "needs ids of text"),
        (Condition(torch.tensor([[1, 2]]), torch.tensor([[0, 0]])), "without a position"),
        (Condition(torch.tensor([[1, 2]]), torch.tensor([[1]])), "mask of shape"),
    ],
)
def test_conditions__that_do_not_fit_are_refused(condition: Condition, message: str) -> None:
    config = tiny(condition="tokens", prefix_length=4)
    with pytest.raises(QLIPError, match=message):
        DecoderModel(config)(some_indices(config, 1), condition)


def test_conditions__may_be_padded_anywhere() -> None:
    config = tiny(condition="tokens", prefix_length=4)
    model = randomized(config)
    given = [
        Condition(torch.tensor([[1, 2]])),
        Condition(torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]])),
        Condition(torch.tensor([[0, 1, 0, 0, 2, 0]]), torch.tensor([[0, 1, 0, 0, 1, 0]])),
    ]
    found = [model(some_indices(config, 1), one) for one in given]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_null_condition__is_what_dropping_makes() -> None:
    for kind, length in (("class", 1), ("features", 4), ("tokens", 4)):
        config = tiny(condition=kind, prefix_length=length)
        model, condition = randomized(config), conditions(config)
        dropped = model.condition(condition, torch.tensor([True, True, True]))
        null = model.condition(model.condition.null(condition))
        real = torch.ones(3, length) if null.start is None else torch.arange(length) >= null.start[:, None]
        assert torch.equal((dropped.embeddings * real[..., None]), (null.embeddings * real[..., None]))
        assert (dropped.start is None) == (null.start is None)
        if null.start is not None and dropped.start is not None:
            assert torch.equal(dropped.start, null.start)
