"""Work of one sample in floating-point operations, and how much of a device's peak a run turns into it (MFU).

A matrix product (m, k) x (k, n) costs 2 m k n: a multiplication and an addition each. Only matrix products count;
norms, activations, rotations and losses are left out, as usual (arXiv 2204.02311, appendix B). So is whatever is
computed twice to save memory: activation checkpointing and the second pass of exact accumulation make a step longer,
not its work larger. For N tokens of width D, MLP width I, a layer's forward pass costs

    8 N D^2 (q, k, v, out)  +  4 N^2 D (scores and their sum; causal ones in full)  +  2 m N D I (m = 2, with SwiGLU 3)

The backward pass costs the same again for the gradient of each product's weights, where they train, and the same again
for that of its input, where anything before it trains: in all twice the forward pass, but for the patch embedding,
whose input are pixels, and for frozen parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qlip.modeling import QLIPConfig, QLIPModel
from qlip.modeling.config import TowerConfig
from qlip.modeling.quantizer import Estimator


@dataclass(frozen=True)
class SampleFlops:
    """Floating-point operations of one image and its caption."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    def __add__(self, other: SampleFlops) -> SampleFlops:
        return SampleFlops(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Product:
    """One matrix product on a sample's way through the model.

    Attributes:
        module: the module it belongs to, whose parameters train or not.
        flops: of the forward pass.
        weights: one operand is a parameter; else both come from the sample.
    """

    module: str
    flops: float
    weights: bool = True


@dataclass(frozen=True)
class Start:
    """Parameters without a product (positions, norms): what comes behind them has a gradient if they train."""

    module: str


Path = list[Product | Start]


def sample_flops(
    config: QLIPConfig,
    trains: Callable[[str], bool] = lambda module: True,
    *,
    aligned: bool = True,
    rebuilt: bool = True,
    estimator: Estimator | None = None,
) -> SampleFlops:
    """Work of one training sample at the trained size: an image, and one caption padded to the text tower's length.

    Args:
        config: of the model.
        trains: dotted name of a module to whether it trains.
        aligned: the alignment loss is on; else neither the text tower nor the projections count.
        rebuilt: the reconstruction loss is on; else neither ``quant_embed_post`` nor the decoder counts.
        estimator: of the codebook entropy; the configuration's where None.
    """
    encoder = _encoder(config)
    found, moved = _walk(encoder, trains, upstream=False)
    found += _walk(_bottleneck(config, estimator), trains, moved)[0]
    if rebuilt:
        moved = moved or (config.vision_config.quantizer_embed_type == "mlp" and trains("vision_model.quant_embed"))
        found += _walk(_decoder(config), trains, moved)[0]
    if aligned:
        moved = any(trains(one.module) for one in encoder)
        found += _walk(
            [_linear("visual_projection", config.vision_config.hidden_size, config.projection_dim)], trains, moved
        )[0]
        found += _walk(_text(config), trains, upstream=False)[0]
    return found


def training_flops(model: QLIPModel, *, aligned: bool = True, rebuilt: bool = True) -> float:
    """:func:`sample_flops` of both passes, of a model whose frozen parts are marked (``requires_grad``)."""

    def trains(module: str) -> bool:
        return any(parameter.requires_grad for parameter in model.get_submodule(module).parameters())

    estimator = model.vision_model.quantizer.estimator
    return sample_flops(model.config, trains, aligned=aligned, rebuilt=rebuilt, estimator=estimator).total


def _walk(path: Path, trains: Callable[[str], bool], upstream: bool) -> tuple[SampleFlops, bool]:
    """Work along a path, and whether anything on it, or before it (``upstream``), trains."""
    forward = backward = 0.0
    for one in path:
        trained = trains(one.module)
        if isinstance(one, Product):
            forward += one.flops
            backward += one.flops * upstream + one.flops * (trained if one.weights else upstream)
            if not one.weights:
                continue
        upstream = upstream or trained
    return SampleFlops(forward, backward), upstream


def _linear(module: str, size_in: int, size_out: int, tokens: int = 1) -> Product:
    return Product(module, 2.0 * tokens * size_in * size_out)


def _layers(module: str, config: TowerConfig, tokens: int) -> Iterator[Product]:
    width, matrices = config.hidden_size, 3 if config.swiglu else 2
    for _ in range(config.num_hidden_layers):
        yield _linear(module, width, 4 * width, tokens)
        yield Product(module, 4.0 * tokens**2 * width, weights=False)
        yield _linear(module, width, matrices * config.intermediate_size, tokens)


def _encoder(config: QLIPConfig) -> Path:
    vision = config.vision_config
    patches, pixels = vision.grid_size**2, vision.num_channels * vision.patch_size**2
    name = "vision_model.embeddings"
    return [
        _linear(name, pixels, vision.hidden_size, patches),
        Start(name),
        Start("vision_model.encoder"),
        *_layers("vision_model.encoder", vision, 1 + patches),
    ]


def _bottleneck(config: QLIPConfig, estimator: Estimator | None) -> Path:
    """Latents, and the mean distributions of their groups: two half tables a group, multiplied over tokens."""
    vision, settings = config.vision_config, config.vision_config.quantizer_cfg
    tokens, width, bits = vision.grid_size**2, vision.hidden_size, settings.embed_dim
    path: Path = []
    if vision.quantizer_embed_type == "mlp":
        name = "vision_model.quant_embed"
        path += [_linear(name, width, width, tokens), _linear(name, width, bits, tokens)]
    estimator = estimator or ("bit" if settings.persample_entropy_compute == "analytical" else "group")
    if estimator == "group":
        groups = bits // settings.group_size
        path.append(Product("vision_model.encoder", 2.0 * tokens * groups * 2**settings.group_size, weights=False))
    return path


def _decoder(config: QLIPConfig) -> Path:
    decoder, name = config.decoder_config, "vision_model.quant_embed_post"
    tokens, post = decoder.grid_size**2, config.vision_config.post_size
    wide = decoder.intermediate_size
    mlp = config.vision_config.quantizer_embed_type == "mlp"
    sizes = (config.vision_config.quantizer_cfg.embed_dim, post) if mlp else ()
    return [
        *(_linear(name, size, post, tokens) for size in sizes),
        Start("vision_decoder"),
        *_layers("vision_decoder", decoder, tokens),
        _linear("vision_decoder", decoder.hidden_size, wide, tokens),
        _linear("vision_decoder", wide, 3 * decoder.patch_size**2, tokens),
    ]


def _text(config: QLIPConfig) -> Path:
    text = config.text_config
    return [
        Start("text_model"),
        *_layers("text_model", text, text.max_position_embeddings),
        _linear("text_projection", text.hidden_size, config.projection_dim),
    ]


PEAKS = {
    # NVIDIA, "NVIDIA <name>" as the driver gives it
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835.5e12,
    "H200": 989e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    # before Ampere there is no bfloat16: float16
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "T4": 65e12,
    # AMD, "AMD Instinct <name>"; a MI250X shows its two halves as devices of their own
    "MI325X": 1307.4e12,
    "MI300X": 1307.4e12,
    "MI250X": 191.5e12,
}
"""Peak bfloat16 operations a second of dense matrix products that add in float32, by a word of the device's name, the
closer name first. From the vendors' data sheets and architecture papers, whose larger figures are with sparsity."""

_OTHER_CHIPS = re.compile(r"\b(Laptop|Max-Q|MIG|4090 D|5090 D)\b", re.IGNORECASE)
"""What shares a name with a larger device, or is a slice of it."""


def peak_flops(device_name: str) -> float | None:
    """Peak of a device by its name, such as "NVIDIA A100-SXM4-80GB"; None where the table does not know it."""
    if _OTHER_CHIPS.search(device_name):
        return None
    for name, peak in PEAKS.items():
        if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE):
            return peak
    return None


def device_peak(device: torch.device) -> float | None:
    """Peak of the device that computes; None for a CPU and for what the table does not know."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
