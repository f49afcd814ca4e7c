from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qlip import QLIPConfig, QLIPError, QLIPModel
from qlip.modeling.parts import BlockGroups, count_parameters, part_of, qlip_groups
from qlip.modeling.transformer import Block
from qlip.training.optim.muon import Muon, orthogonalize
from qlip.training.optim.optimizers import build_optimizers, load_named_state, named_state
from qlip.training.recipe_schema import OptimizerSection
from qlip.training.tasks.recipe_schema import TokenizerOptimizerSection


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


def test_orthogonalize_in_bfloat16_is_near_what_float32_gives() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 20, 8)
    exact, rough = orthogonalize(matrices), orthogonalize(matrices, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    assert float((exact - rough).norm() / exact.norm()) < 0.03


def test_muon_precision_reaches_the_optimizer() -> None:
    for name in ("float32", "bfloat16"):
        settings = OptimizerSection(name="muon", muon_precision=name)
        model = QLIPModel(QLIPConfig.named("debug-B-16"))
        (dtype,) = (
            o.dtype
            for o in build_optimizers(model.named_parameters(), settings, qlip_groups(model))
            if isinstance(o, Muon)
        )
        assert dtype == getattr(torch, name)
    with pytest.raises(ValueError, match="muon_precision is used only with name: muon"):
        OptimizerSection(name="adamw", muon_precision="bfloat16")


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
    for name, decay_embeddings in (("adamw", False), ("lamb", False), ("muon", False), ("adamw", True)):
        settings = OptimizerSection(name=name, weight_decay=0.1, decay_embeddings=decay_embeddings)
        optimizers = build_optimizers(model.named_parameters(), settings, qlip_groups(model))
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
        # LAMB's trust ratio goes with weight decay, and EVA-CLIP's embeddings have both
        embeddings = {"vision_model.embeddings.position_embedding.weight", "vision_decoder.position_embeddings"}
        embeddings |= {f"text_model.embeddings.{one}_embedding.weight" for one in ("token", "position")}
        embeddings.add("vision_model.embeddings.patch_embedding.weight")
        assert {decay[one] for one in embeddings} == {0.1 if name == "lamb" or decay_embeddings else 0.0}
        assert all(value == 0 for key, value in decay.items() if key.endswith("bias") or "norm" in key or "_ln." in key)
        assert decay["vision_model.encoder.layers.0.mlp.w1.weight"] == 0.1


def test_lamb__moves_an_embedding_by_the_rate_times_its_norm(checkpoint: Path) -> None:
    model = QLIPModel.from_pretrained(checkpoint)
    (lamb,) = build_optimizers(model.named_parameters(), OptimizerSection(name="lamb", lr=0.01), qlip_groups(model))
    table = model.text_model.embeddings.token_embedding.weight
    before = table.detach().clone()
    table.grad = torch.randn_like(table)
    lamb.step()
    assert float((table - before).norm()) == pytest.approx(0.01 * float(before.norm()), rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_optimizer_state_by_name_goes_on_exactly(checkpoint: Path, name: str) -> None:
    def step(model: QLIPModel, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()

    settings = OptimizerSection(name=name)
    first = QLIPModel.from_pretrained(checkpoint)
    optimizers = build_optimizers(first.named_parameters(), settings, qlip_groups(first))
    step(first, optimizers, 0)
    second = QLIPModel.from_pretrained(checkpoint)
    second.load_state_dict(first.state_dict())
    restored = build_optimizers(second.named_parameters(), settings, qlip_groups(second))
    for old, new in zip(optimizers, restored, strict=True):
        load_named_state(new, {key: value.clone() for key, value in named_state(old).items()})
    step(first, optimizers, 1)
    step(second, restored, 1)
    for (key, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), key


def test_block_matrices(checkpoint: Path) -> None:
    groups = qlip_groups(QLIPModel.from_pretrained(checkpoint))
    assert groups.is_matrix("vision_model.encoder.layers.0.mlp.w1.weight")
    assert not groups.is_matrix("vision_model.encoder.layers.0.mlp.w1.bias")
    assert not groups.is_matrix("vision_model.quant_embed.c_fc.weight")


class Decoder(nn.Module):
    """A model of another shape and other names: an embedding, two blocks, a norm and a head."""

    class Layer(Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up = nn.LayerNorm(4), nn.Linear(4, 4)

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(7, 4), nn.ModuleList(self.Layer() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7, bias=False)


def test_block_groups__read_off_any_models_modules() -> None:
    groups = BlockGroups(Decoder())
    depths = {"embed.weight": 3, "blocks.0.up.weight": 2, "blocks.1.norm.bias": 1, "norm.weight": 0, "head.weight": 0}
    assert {name: groups.depth(name) for name in depths} == depths
    names = [name for name, _ in Decoder().named_parameters()]
    matrices = ["blocks.0.up.weight", "blocks.1.up.weight"]
    assert [name for name in names if groups.is_matrix(name)] == matrices
    assert [name for name in names if groups.decays(name)] == [
        "blocks.0.up.weight",
        "blocks.1.up.weight",
        "head.weight",
    ]
    assert {groups.part(name) for name in names} == {"model"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (OptimizerSection(name="muon"), "optimizer.name muon: the model has no trainable matrix inside a Block"),
        (OptimizerSection(layer_decay=0.5), "optimizer.layer_decay: the model has no trainable Block"),
    ],
)
def test_build_optimizers__refuses_settings_that_apply_to_nothing(settings: OptimizerSection, message: str) -> None:
    model = Decoder(blocks=0)
    with pytest.raises(QLIPError, match=message):
        build_optimizers(model.named_parameters(), settings, BlockGroups(model))
    model = Decoder()
    model.blocks.requires_grad_(False)
    model.embed.requires_grad_(False)
    with pytest.raises(QLIPError, match=message):
        build_optimizers(model.named_parameters(), settings, BlockGroups(model))


def groups_by_name(model: QLIPModel, settings: OptimizerSection) -> dict[str, dict]:
    return {
        name: group
        for optimizer in build_optimizers(
            model.named_parameters(), settings, qlip_groups(model), getattr(settings, "parts", {})
        )
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


EXAMPLES = {
    "vision_model.embeddings.class_embedding": "encoder",
    "vision_model.embeddings.patch_embedding.weight": "encoder",
    "vision_model.encoder.layers.1.self_attn.q_proj.weight": "encoder",
    "vision_model.post_layernorm.weight": "encoder",
    "vision_model.quant_embed.c_fc.weight": "bottleneck",
    "vision_model.quant_embed_post.c_proj.bias": "bottleneck",
    "text_model.embeddings.token_embedding.weight": "text",
    "text_model.final_layer_norm.bias": "text",
    "vision_decoder.position_embeddings": "decoder",
    "vision_decoder.conv_out.weight": "decoder",
    "visual_projection.weight": "bottleneck",
    "text_projection.weight": "bottleneck",
    "logit_scale": "bottleneck",
}


def test_parts_of_a_model(checkpoint: Path) -> None:
    names = dict(QLIPModel.from_pretrained(checkpoint).named_parameters())
    for name, part in EXAMPLES.items():
        assert name in names and part_of(name) == part
        assert part_of(f"module.model.{name}") == part  # behind a wrapper
    assert part_of("align_bias") == "bottleneck"


@pytest.mark.parametrize("name", ["QLIP-B-16-256", "QLIP-B-8-256", "QLIP-L-14-392"])
def test_parts_of_published_models_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        counts = count_parameters(QLIPModel(QLIPConfig.named(name)).named_parameters())
    tower = 304e6 if "-L-" in name else 87e6  # (paper, table of models); the count of B includes the bottleneck's share
    assert counts["encoder"] == pytest.approx(tower, rel=0.03)
    assert counts["decoder"] == pytest.approx(tower, rel=0.03)


def lock(model: QLIPModel, *parts: str) -> None:
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)


def test_a_locked_part_does_not_train(checkpoint: Path) -> None:
    model = QLIPModel.from_pretrained(checkpoint)
    lock(model, "text", "encoder")
    groups = groups_by_name(model, OptimizerSection())
    assert {part_of(name) for name in groups} == {"decoder", "bottleneck"}
    lock(model, "decoder", "bottleneck")
    with pytest.raises(QLIPError, match="nothing to train"):
        build_optimizers(model.named_parameters(), OptimizerSection(), qlip_groups(model))


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_parts_have_rates_of_their_own(checkpoint: Path, name: str) -> None:
    rates = {"encoder": 2e-4, "text": 0, "decoder": 2e-3}
    settings = TokenizerOptimizerSection(name=name, lr=5e-4, parts=rates)
    groups = groups_by_name(QLIPModel.from_pretrained(checkpoint), settings)
    assert not any(part_of(parameter) == "text" for parameter in groups)
    for parameter, group in groups.items():
        expected = {"encoder": 2e-4, "decoder": 2e-3, "bottleneck": 5e-4}[part_of(parameter)]
        assert group["lr"] == group["initial_lr"] == pytest.approx(expected, rel=1e-12)


def test_parts_scale_muons_rate_too(checkpoint: Path) -> None:
    settings = TokenizerOptimizerSection(name="muon", lr=1e-3, muon_lr=4e-3, parts={"text": 1e-4})
    groups = groups_by_name(QLIPModel.from_pretrained(checkpoint), settings)
    assert groups["text_model.encoder.layers.0.mlp.fc1.weight"]["initial_lr"] == pytest.approx(4e-4)
    assert groups["text_model.encoder.layers.0.mlp.fc1.bias"]["initial_lr"] == pytest.approx(1e-4)
    assert groups["vision_model.encoder.layers.0.mlp.w1.weight"]["initial_lr"] == pytest.approx(4e-3)


def test_layers_further_from_the_output_learn_more_slowly(checkpoint: Path) -> None:
    model = QLIPModel.from_pretrained(checkpoint)  # two blocks in encoder and decoder, one in the text tower
    distances = {
        "vision_model.post_layernorm.weight": 0,
        "vision_model.encoder.layers.1.mlp.w1.weight": 1,
        "vision_model.encoder.layers.0.mlp.w1.weight": 2,
        "vision_model.embeddings.patch_embedding.weight": 3,
        "vision_decoder.conv_out.weight": 0,
        "vision_decoder.encoder.layers.1.layer_norm1.weight": 1,
        "vision_decoder.position_embeddings": 3,
        "text_model.final_layer_norm.weight": 0,
        "text_model.encoder.layers.0.mlp.fc1.weight": 1,
        "text_model.embeddings.token_embedding.weight": 2,
        "vision_model.quant_embed.c_fc.weight": 0,
        "logit_scale": 0,
    }
    depths = qlip_groups(model)
    groups = groups_by_name(model, TokenizerOptimizerSection(lr=1e-3, parts={"text": 1e-4}, layer_decay=0.5))
    for name, distance in distances.items():
        assert depths.depth(name) == distance
        peak = 1e-4 if part_of(name) == "text" else 1e-3
        assert groups[name]["initial_lr"] == pytest.approx(peak * 0.5**distance)


def test_the_recipes_epsilon_reaches_the_optimizer(checkpoint: Path) -> None:
    for name in ("adamw", "lamb"):
        groups = groups_by_name(QLIPModel.from_pretrained(checkpoint), OptimizerSection(name=name, eps=1e-5))
        assert all(group["eps"] == 1e-5 and group["betas"] == (0.9, 0.95) for group in groups.values())
