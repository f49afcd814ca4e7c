from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qlip import QLIPModel
from qlip.training.muon import Muon, orthogonalize
from qlip.training.optimizers import build_optimizers, is_block_matrix, load_named_state, named_state
from qlip.training.recipe import OptimizerSection
from qlip.training.schedule import warmup_cosine


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 20), (2, 20, 8)])
def test_orthogonalize_keeps_the_singular_vectors(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalize(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ result @ right.mT  # diagonal where the singular vectors are the same
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert float((values - torch.diag_embed(diagonal)).abs().max()) < 1e-3
    assert float(diagonal.min()) > 0.3 and float(diagonal.max()) < 1.3
    assert float(orthogonalize(torch.zeros(shape)).abs().max()) == 0


def test_muon_in_batches_is_muon_one_by_one() -> None:
    torch.manual_seed(0)
    starts = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6), torch.randn(6, 4)]
    gradients = [[torch.randn_like(start) for start in starts] for _ in range(3)]
    together = [nn.Parameter(start.clone()) for start in starts]
    alone = [nn.Parameter(start.clone()) for start in starts]
    optimizers = [Muon(together, lr=0.1, weight_decay=0.1), *(Muon([one], lr=0.1, weight_decay=0.1) for one in alone)]
    for step in gradients:
        for parameters in (together, alone):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_muon_step_against_its_formula() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 4), torch.randn(6, 4)
    parameter = nn.Parameter(start.clone())
    parameter.grad = gradient.clone()
    Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    nesterov = gradient * (0.1 + 0.9 * 0.1)  # a first step: the average is a tenth of the gradient
    nesterov = gradient + (gradient * 0.1 - gradient) * 0.9
    update = orthogonalize(nesterov[None])[0]
    torch.testing.assert_close(parameter.data, start * 0.95 - 0.1 * 0.2 * 6**0.5 * update)


def test_every_parameter_has_one_optimizer_and_the_right_decay(checkpoint: Path) -> None:
    model = QLIPModel.from_pretrained(checkpoint)
    for name in ("adamw", "muon"):
        optimizers = build_optimizers(model.named_parameters(), OptimizerSection(name=name, weight_decay=0.1))
        decay = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter_name in group["param_names"]:
                    assert parameter_name not in decay
                    decay[parameter_name] = group["weight_decay"]
                if isinstance(optimizer, Muon):
                    assert all(".encoder.layers." in n for n in group["param_names"])
        assert decay.keys() == dict(model.named_parameters()).keys()
        assert decay["logit_scale"] == decay["vision_model.embeddings.class_embedding"] == 0
        assert decay["vision_model.embeddings.position_embedding.weight"] == 0
        assert decay["text_model.embeddings.token_embedding.weight"] == 0
        assert decay["vision_decoder.position_embeddings"] == 0
        assert all(value == 0 for key, value in decay.items() if key.endswith("bias") or "norm" in key or "_ln." in key)
        assert decay["vision_model.embeddings.patch_embedding.weight"] == 0
        assert decay["vision_model.encoder.layers.0.mlp.w1.weight"] == 0.1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_by_name_goes_on_exactly(checkpoint: Path, name: str) -> None:
    def step(model: QLIPModel, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()

    settings = OptimizerSection(name=name)
    first = QLIPModel.from_pretrained(checkpoint)
    optimizers = build_optimizers(first.named_parameters(), settings)
    step(first, optimizers, 0)
    second = QLIPModel.from_pretrained(checkpoint)
    second.load_state_dict(first.state_dict())
    restored = build_optimizers(second.named_parameters(), settings)
    for old, new in zip(optimizers, restored, strict=True):
        load_named_state(new, {key: value.clone() for key, value in named_state(old).items()})
    step(first, optimizers, 1)
    step(second, restored, 1)
    for (key, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), key


def test_block_matrices() -> None:
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert is_block_matrix("vision_model.encoder.layers.0.mlp.w1.weight", matrix)
    assert not is_block_matrix("vision_model.encoder.layers.0.mlp.w1.bias", vector)
    assert not is_block_matrix("vision_model.quant_embed.c_fc.weight", matrix)


def test_warmup_then_half_a_cosine() -> None:
    def factor(step: int) -> float:
        return warmup_cosine(step, steps=110, warmup=10, floor=0.1)

    assert [factor(step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert factor(10) == 1.0
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)
    rates = [factor(step) for step in range(10, 111)]
    assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))
