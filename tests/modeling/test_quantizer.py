"""The quantizer alone against the reference's stored losses and gradients, and its behaviour at the edges."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlip.errors import QLIPError
from qlip.modeling.config import QuantizerConfig
from qlip.modeling.indices import regroup
from qlip.modeling.quantizer import BinarySphericalQuantizer, bsq_entropies
from tests.literal import bsq_losses
from tests.modeling.helpers import FIXTURES, assert_close, assert_grad_close, persample_allowance

CASES = json.loads((FIXTURES / "bsq_losses" / "bsq_losses.json").read_text())
TENSORS = load_file(FIXTURES / "bsq_losses" / "bsq_losses.safetensors")
NAMES = ("embed_dim", "group_size", "l2_norm", "inv_temperature", "beta", "gamma_0", "gamma_1")


def _quantizer(case: dict[str, Any], estimator: str) -> BinarySphericalQuantizer:
    chosen = {name: case[name] for name in NAMES}
    config = QuantizerConfig(**chosen, input_format="blc", persample_entropy_compute=estimator)
    return BinarySphericalQuantizer(config).train()


def _latents(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The stored input as a leaf, and the same as (B, N, L) tokens."""
    leaf = TENSORS[f"{case['case']}.z"].clone().requires_grad_()
    tokens = leaf if case["input_format"] == "blc" else leaf.permute(0, 2, 3, 1).flatten(1, 2)
    return leaf, tokens


def _as_tokens(case: dict[str, Any], stored: Tensor) -> Tensor:
    return stored if case["input_format"] == "blc" else stored.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("estimator", ["group", "analytical"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['embed_dim']}by{case['group_size']}")
def test_quantizer__losses_and_gradients_equal_the_stored(case: dict[str, Any], estimator: str) -> None:
    leaf, tokens = _latents(case)
    output = _quantizer(case, estimator)(tokens)
    group_size = 1 if estimator == "analytical" else case["group_size"]
    allowance = persample_allowance(group_size, case["embed_dim"] // group_size)
    computed = {
        "loss": (output.loss, "grad_loss", case["gamma_0"] * allowance / case["inv_temperature"]),
        "persample_entropy": (output.persample_entropy, "grad_persample", allowance),
        "codebook_entropy": (output.codebook_entropy, "grad_codebook", 0.0),
    }
    for name, (value, grad_name, extra) in computed.items():
        assert value is not None
        stored = f"{case['case']}.{estimator}"
        assert_close(name, value.detach(), TENSORS[f"{stored}.{name}"], extra=extra)
        (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
        assert_grad_close(grad_name, gradient, TENSORS[f"{stored}.{grad_name}"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['embed_dim']}by{case['group_size']}")
def test_quantizer__codes_indices_and_straight_through_gradient(case: dict[str, Any]) -> None:
    number = case["case"]
    leaf, tokens = _latents(case)
    output = _quantizer(case, "group")(tokens)
    assert_close("codes", output.codes.detach(), _as_tokens(case, TENSORS[f"{number}.zq"]))
    cotangent = _as_tokens(case, TENSORS[f"{number}.cotangent"])
    (gradient,) = torch.autograd.grad((output.codes * cotangent).sum(), leaf)
    assert_grad_close("straight through", gradient, TENSORS[f"{number}.group.grad_zq"])
    groups = TENSORS[f"{number}.group_indices"].reshape(output.indices.shape)
    assert torch.equal(output.indices, groups)
    whole = regroup(output.indices, case["embed_dim"], from_group_size=case["group_size"])
    assert torch.equal(whole.flatten(), TENSORS[f"{number}.indices_exact"].flatten())


def test_quantizer__straight_through_scale_only_with_l2_norm() -> None:
    for l2_norm, scale in ((True, 1 / math.sqrt(8)), (False, 1.0)):
        config = QuantizerConfig(embed_dim=8, group_size=4, input_format="blc", l2_norm=l2_norm)
        latents = torch.randn(1, 3, 8, requires_grad=True)
        BinarySphericalQuantizer(config)(latents).codes.sum().backward()
        assert latents.grad is not None
        torch.testing.assert_close(latents.grad, torch.full_like(latents, scale))


def test_quantizer__no_losses_in_eval() -> None:
    config = QuantizerConfig(embed_dim=8, group_size=4, input_format="blc", beta=1.0)
    output = BinarySphericalQuantizer(config).eval()(torch.randn(1, 3, 8))
    assert (output.loss, output.persample_entropy, output.codebook_entropy, output.commitment) == (None,) * 4


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 7, 9])
@pytest.mark.parametrize("temperature", [0.5, 10.0, 100.0])
def test_bsq_entropies__equal_the_whole_table(group_size: int, temperature: float) -> None:
    """The product of half tables against the softmax over every corner, forward and backward, in float64."""
    torch.manual_seed(group_size)
    bits = 2 * group_size
    z = torch.nn.functional.normalize(torch.randn(2, 11, bits, dtype=torch.float64), dim=-1).requires_grad_()
    table = bsq_losses(z, _literal_config(bits, group_size, temperature))
    scale = bits**-0.5
    persample, codebook = bsq_entropies(z.flatten(0, 1), group_size, temperature, scale, "group")
    allowance = persample_allowance(group_size, 2)
    assert_close("S", persample.detach(), table["S"].detach(), extra=allowance)
    torch.testing.assert_close(codebook, table["H"], rtol=1e-9, atol=1e-12)
    for ours, theirs in ((persample, table["S"]), (codebook, table["H"])):
        (actual,) = torch.autograd.grad(ours, z, retain_graph=True)
        (expected,) = torch.autograd.grad(theirs, z, retain_graph=True)
        assert_grad_close("gradient", actual, expected)


def _literal_config(bits: int, group_size: int, temperature: float = 100.0) -> dict[str, Any]:
    return {
        "embed_dim": bits,
        "group_size": group_size,
        "l2_norm": True,
        "inv_temperature": temperature,
        "beta": 0.0,
        "gamma_0": 1.0,
        "gamma_1": 1.0,
        "persample_entropy_compute": "group",
    }


def test_bsq_entropies__estimators_are_ordered_and_share_the_persample_entropy() -> None:
    torch.manual_seed(0)
    latents = torch.nn.functional.normalize(torch.randn(64, 12) + 0.3, dim=-1)
    group = bsq_entropies(latents, 6, 20.0, 12**-0.5, "group")
    bit = bsq_entropies(latents, 6, 20.0, 12**-0.5, "bit")
    torch.testing.assert_close(group[0], bit[0])
    assert group[1] < bit[1]


def test_bsq_entropies__gradient_is_finite_if_a_mean_underflows() -> None:
    """At 14 bits a corner far from every token has mean probability 0 in float32: log(0) without the 1e-8."""
    torch.manual_seed(0)
    latents = torch.full((4, 28), 28**-0.5) * torch.tensor([1.0, -1.0]).repeat(14)
    latents.requires_grad_()
    _, codebook = bsq_entropies(latents, 14, 100.0, 1.0, "group")
    codebook.backward()
    assert torch.isfinite(codebook)
    assert latents.grad is not None
    assert torch.isfinite(latents.grad).all()


class _LargestTensor(TorchDispatchMode):
    """Records the most elements that any operator's result has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("estimator", ["group", "analytical"])
def test_bsq_statistics__no_table_of_tokens_by_corners(estimator: str) -> None:
    tokens, group_size = 300, 14
    case = {"embed_dim": 28, "group_size": group_size, "l2_norm": True, "inv_temperature": 100.0}
    quantizer = _quantizer({**case, "beta": 0.5, "gamma_0": 1.0, "gamma_1": 1.0}, estimator)
    latents = torch.nn.functional.normalize(torch.randn(3, tokens // 3, 28), dim=-1).requires_grad_()
    with _LargestTensor() as largest:
        loss = quantizer(latents).loss
        assert loss is not None
        loss.backward()
    # the largest things made are the two half tables and the groups' mean distributions
    assert largest.numel <= 2 * max(2 * tokens * 2**7, 2 * 2**group_size)
    assert largest.numel < tokens * 2**group_size / 50


def test_bsq_statistics__too_large_groups_are_refused_with_the_reason() -> None:
    quantizer = BinarySphericalQuantizer(QuantizerConfig(embed_dim=26, group_size=26, input_format="blc")).train()
    with pytest.raises(QLIPError, match=r"26 bits.*at most 24"):
        quantizer(torch.randn(1, 2, 26))
    assert quantizer.eval()(torch.randn(1, 2, 26)).indices.shape == (1, 2, 1)
    bits = QuantizerConfig(embed_dim=26, group_size=26, input_format="blc", persample_entropy_compute="analytical")
    assert BinarySphericalQuantizer(bits).train()(torch.randn(1, 2, 26)).codebook_entropy is not None


def test_bsq_entropies__groups_of_24_bits() -> None:
    """Three different corners are log(3) nats; the published 1e-8 adds its own at each of the 2^24 others."""
    corners = torch.where(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)) > 0, 1.0, -1.0)
    _, codebook = bsq_entropies(corners * 24**-0.5, 24, 1000.0, 24**-0.5, "group")
    padding = 2**24 * 1e-8 * math.log(1e8)
    assert codebook.item() == pytest.approx(math.log(3) + padding, rel=1e-4)


def test_quantizer__nan_latent_stays_nan() -> None:
    quantizer = BinarySphericalQuantizer(QuantizerConfig(embed_dim=4, group_size=2, input_format="blc")).eval()
    codes = quantizer(torch.tensor([[[float("nan"), 1.0, -1.0, 0.5]]])).codes
    assert codes.isnan().tolist() == [[[True, False, False, False]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizer__losses_are_float32_under_autocast_and_in_half_precision(dtype: torch.dtype) -> None:
    quantizer = BinarySphericalQuantizer(
        QuantizerConfig(embed_dim=12, group_size=6, input_format="blc", beta=0.25)
    ).train()
    latents = torch.nn.functional.normalize(torch.randn(2, 9, 12), dim=-1).to(dtype)
    exact = quantizer(latents.float())
    with torch.autocast("cpu", dtype=dtype):
        output = quantizer(latents)
    for name in ("loss", "persample_entropy", "codebook_entropy", "commitment"):
        value, expected = getattr(output, name), getattr(exact, name)
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, expected, rtol=2e-3, atol=1e-4)
    assert output.codes.dtype == dtype
