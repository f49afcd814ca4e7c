from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qlip import QLIPConfig, QLIPModel
from qlip.training.flops import peak_flops, sample_flops, training_flops

BATCH = 3


def counted(model: QLIPModel, aligned: bool, rebuilt: bool) -> tuple[float, float]:
    """Forward and backward operations a sample, counted by PyTorch as they run.

    The attention kernel of the CPU is not in PyTorch's count, nor is what the backward pass of a fused one computes
    anew work of the model: plain products are counted instead.
    """
    torch.manual_seed(0)
    side, length = model.image_size, model.config.text_config.max_position_embeddings
    pixels, ids = torch.randn(BATCH, 3, side, side), torch.randint(0, 500, (BATCH, length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(pixels, ids if aligned else None, reconstruct=rebuilt)
        loss = output.quantizer_loss
        assert loss is not None
        if rebuilt:
            loss = loss + output.reconstructions.sum()
        if aligned:
            loss = loss + (output.image_embeds * output.text_embeds).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward / BATCH, (counter.get_total_flops() - forward) / BATCH


def post_forward(model: QLIPModel) -> float:
    post = model.vision_model.quant_embed_post
    return 2 * model.grid[0] * model.grid[1] * (post.c_fc.weight.numel() + post.c_proj.weight.numel())


def agrees(model: QLIPModel, aligned: bool = True, rebuilt: bool = True) -> None:
    def trains(name: str) -> bool:
        return any(parameter.requires_grad for parameter in model.get_submodule(name).parameters())

    ours = sample_flops(model.config, trains, aligned=aligned, rebuilt=rebuilt)
    forward, backward = counted(model, aligned, rebuilt)
    if rebuilt:
        assert ours.forward == pytest.approx(forward, rel=0.02)
    else:  # the model runs quant_embed_post all the same, for nothing
        assert ours.forward == pytest.approx(forward - post_forward(model), rel=0.02)
    assert ours.backward == pytest.approx(backward, rel=0.02)
    assert training_flops(model, aligned=aligned, rebuilt=rebuilt) == ours.total


@pytest.fixture
def model(checkpoint: Path) -> QLIPModel:
    return QLIPModel.from_pretrained(checkpoint).train()


def test_the_formula_is_what_runs(model: QLIPModel) -> None:
    agrees(model)
    agrees(model, aligned=False)
    agrees(model, rebuilt=False)


@pytest.mark.parametrize(
    "frozen",
    [
        ["vision_model.embeddings", "vision_model.encoder"],  # a locked image tower
        ["text_model"],
        ["vision_model.quant_embed"],
    ],
)
def test_frozen_parts_cost_less(model: QLIPModel, frozen: list[str]) -> None:
    whole = training_flops(model)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    agrees(model)
    assert training_flops(model) < whole


@pytest.mark.parametrize("freeze_codes", [False, True])
def test_stage_2_runs_the_encoder_forward_only(model: QLIPModel, freeze_codes: bool) -> None:
    model.requires_grad_(False)
    model.vision_model.quant_embed_post.requires_grad_(True)
    model.vision_decoder.requires_grad_(True)
    model.vision_model.quant_embed.requires_grad_(not freeze_codes)
    agrees(model, aligned=False)


def test_another_model_of_other_layers(model: QLIPModel) -> None:
    """GELU instead of SwiGLU, no bottleneck before the quantizer, entropies from bits."""
    values = model.config.to_json_dict()
    for tower in ("vision_config", "decoder_config"):
        values[tower] = values[tower] | {"swiglu": False, "num_hidden_layers": 1}
    values["vision_config"] |= {"quantizer_embed_type": "identity", "quantizer_l2_norm": True}
    values["vision_config"]["quantizer_cfg"] |= {"embed_dim": 32, "persample_entropy_compute": "analytical"}
    agrees(QLIPModel(QLIPConfig.from_dict(values)).train())


def test_the_published_size_by_the_rule_of_thumb() -> None:
    """6 times parameters times tokens, and the attention on top."""
    config = QLIPConfig.named("QLIP-B-16-256")
    with torch.device("meta"):
        model = QLIPModel(config)
    layers = sum(one.numel() for one in model.vision_model.encoder.parameters()) * 257
    layers += sum(one.numel() for one in model.vision_decoder.encoder.parameters()) * 256
    layers += sum(one.numel() for one in model.text_model.encoder.parameters()) * 77
    assert training_flops(model) == pytest.approx(6 * layers, rel=0.1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_by_the_names_that_drivers_give(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
