"""The image side: patches to tokens (encoder and bottleneck) and tokens to pixels (decoder).

Shapes: B images of H x W pixels, patch p, grid h x w = H/p x W/p, N = h * w tokens, D width, L bits per token, P the
decoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.modeling.attention import rope_tables
from qlip.modeling.config import QLIPDecoderConfig, QLIPVisionConfig, TowerConfig
from qlip.modeling.quantizer import BinarySphericalQuantizer, Quantizer, QuantizerOutput
from qlip.modeling.transformer import Encoder

Grid = tuple[int, int]


@dataclass
class VisionOutput:
    """Output of the encoder.

    Attributes:
        last_hidden_state: (B, N, P), the quantised latents mapped to the decoder's width (not the tower's output).
        pooler_output: (B, D), the normalised [CLS].
        quantizer: codes, indices and, in training, the loss.
        grid: rows and columns of tokens.
        hidden_states: the embeddings and every layer's output, (B, 1 + N, D) each, [CLS] first; None unless requested.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    quantizer: QuantizerOutput
    grid: Grid
    hidden_states: tuple[Tensor, ...] | None = None


class Rope(nn.Module):
    """Rotary tables: computed, never stored and never loaded."""

    def __init__(self, config: TowerConfig, grid: Grid, num_prefix: int) -> None:
        super().__init__()
        self.grid, self.num_prefix, self.head_dim = grid, num_prefix, config.head_dim
        self.compute_tables(None)

    def compute_tables(self, device: torch.device | None) -> None:
        """Compute the tables of the trained grid on a device."""
        cos, sin = rope_tables(self.grid, self.head_dim, self.num_prefix, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Tables for a grid, (num_prefix + h * w, d / 2) float32 each."""
        if grid == self.grid:
            return self.get_buffer("cos"), self.get_buffer("sin")
        return rope_tables(grid, self.head_dim, self.num_prefix, self.get_buffer("cos").device)


def compute_rope_tables(model: nn.Module) -> None:
    """Compute the rotary tables of a model that was built on the meta device, on the CPU; no checkpoint holds them."""
    for module in model.modules():
        if isinstance(module, Rope):
            module.compute_tables(torch.device("cpu"))


class Projection(nn.Module):
    """One side of the bottleneck: c_proj(gelu(c_fc x))."""

    def __init__(self, size_in: int, hidden: int, size_out: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(size_in, hidden)
        self.c_proj = nn.Linear(hidden, size_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size_in) to (..., size_out)."""
        return self.c_proj(F.gelu(self.c_fc(x)))  # type: ignore[no-any-return]


def interpolate_positions(table: Tensor, trained: Grid, grid: Grid) -> Tensor:
    """Resample position embeddings bicubically to another grid; returns ``table`` itself if the grids are equal.

    Args:
        table: (1, h * w, D) for the ``trained`` grid.
        trained, grid: rows and columns of the table's grid and of the result's.
    """
    if grid == trained:
        return table
    image = table.unflatten(1, trained).permute(0, 3, 1, 2)  # (1, D, h, w)
    resampled = F.interpolate(image.float(), size=grid, mode="bicubic", align_corners=False)
    return resampled.to(table.dtype).flatten(2).transpose(1, 2)


class VisionEmbeddings(nn.Module):
    """Patch embeddings after [CLS], plus position embeddings."""

    def __init__(self, config: QLIPVisionConfig) -> None:
        super().__init__()
        self.patch_size, self.trained = config.patch_size, (config.grid_size, config.grid_size)
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(1 + config.grid_size**2, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 1 + N, D)."""
        grid = self.grid_of(pixel_values)
        # a convolution with stride equal to its kernel is one matrix product over unfolded patches
        patches = F.pixel_unshuffle(pixel_values, self.patch_size).flatten(2).transpose(1, 2)  # (B, N, C * p * p)
        weight = self.patch_embedding.weight.flatten(1)
        tokens = F.linear(patches, weight, self.patch_embedding.bias)  # (B, N, D)
        positions = self.position_embedding.weight
        patch_positions = interpolate_positions(positions[None, 1:], self.trained, grid)
        class_token = (self.class_embedding + positions[0]).expand(tokens.shape[0], 1, -1)
        return torch.cat((class_token.to(tokens.dtype), tokens + patch_positions), 1)

    def grid_of(self, pixel_values: Tensor) -> Grid:
        """Rows and columns of patches of (B, C, H, W) pixels. Raises QLIPError if the patch does not divide them."""
        channels = self.patch_embedding.in_channels
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            kind = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise QLIPError(f"pixel_values must be a tensor of floats, got {kind}; QLIPProcessor makes one of images")
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise QLIPError(f"pixel_values must be (B, {channels}, H, W), got {tuple(pixel_values.shape)}")
        height, width = pixel_values.shape[2:]
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise QLIPError(
                f"image size {height} x {width} is not a multiple of the patch size {self.patch_size};"
                " crop or resize it, or use QLIPProcessor"
            )
        return height // self.patch_size, width // self.patch_size


class VisionTower(nn.Module):
    """Encoder and bottleneck."""

    def __init__(self, config: QLIPVisionConfig) -> None:
        super().__init__()
        width, post = config.hidden_size, config.post_size
        self.embeddings = VisionEmbeddings(config)
        self.rope = Rope(config, self.embeddings.trained, num_prefix=1) if config.rope else None
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.quantizer: Quantizer = BinarySphericalQuantizer(config.quantizer_cfg)
        num_bits, has_mlp = self.quantizer.num_bits, config.quantizer_embed_type == "mlp"
        self.quant_embed = Projection(width, width, num_bits) if has_mlp else None  # None: the identity, L == D
        self.quant_embed_post = Projection(num_bits, post, post) if has_mlp else None  # None: the identity, P == L
        self.l2_norm = config.quantizer_l2_norm

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> VisionOutput:
        """Encode and quantise (B, C, H, W) normalised pixels."""
        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        last, grid = self.run_encoder(pixel_values, hidden_states)  # (B, 1 + N, D)
        quantized = self.quantizer(self.latents(last[:, 1:]))
        return VisionOutput(
            last_hidden_state=self.embed_codes(quantized.codes),
            pooler_output=self.post_layernorm(last[:, 0]),
            quantizer=quantized,
            grid=grid,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
        )

    def run_encoder(
        self, pixel_values: Tensor, hidden_states: list[Tensor] | None = None, num_layers: int | None = None
    ) -> tuple[Tensor, Grid]:
        """The tower's raw output (B, 1 + N, D), no norm, and the grid."""
        grid = self.embeddings.grid_of(pixel_values)
        rope = None if self.rope is None else self.rope(grid)
        x = self.embeddings(pixel_values)
        return self.encoder(x, rope=rope, hidden_states=hidden_states, num_layers=num_layers), grid

    def num_layers_of(self, layer: int) -> int:
        """Number of blocks that make a hidden state, so that those behind it need not run.

        Args:
            layer: index into the list of hidden states: 0 is the embeddings, -1 the last layer's output.

        Raises:
            QLIPError: no such layer.
        """
        depth = len(self.encoder.layers)
        if not -depth - 1 <= layer <= depth:
            raise QLIPError(f"layer {layer} does not exist: the encoder has {depth}; choose -{depth + 1} to {depth}")
        return layer % (depth + 1)

    def latents(self, patches: Tensor) -> Tensor:
        """(B, N, D) patches of the last layer to the quantizer's input, (B, N, L), on the unit sphere."""
        latents = patches if self.quant_embed is None else self.quant_embed(patches)
        if self.l2_norm:
            latents = F.normalize(latents.float(), dim=-1, eps=1e-12).to(latents.dtype)
        return latents

    def embed_codes(self, codes: Tensor) -> Tensor:
        """(B, N, L) codes to the decoder's input, (B, N, P)."""
        return codes if self.quant_embed_post is None else self.quant_embed_post(codes)


class VisionDecoder(nn.Module):
    """Tokens to pixels: blocks without [CLS], then norm, linear, tanh, and linear to a patch's pixels."""

    def __init__(self, config: QLIPDecoderConfig) -> None:
        super().__init__()
        self.trained = (config.grid_size, config.grid_size)
        self.patch_size = config.patch_size
        width = config.hidden_size
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.grid_size**2, width))
        self.rope = Rope(config, self.trained, num_prefix=0) if config.rope else None
        self.encoder = Encoder(config)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ffn = nn.Sequential(nn.Linear(width, config.intermediate_size), nn.Tanh())
        self.conv_out = nn.Linear(config.intermediate_size, 3 * config.patch_size**2)

    def forward(self, embeddings: Tensor, grid: Grid, hidden_states: list[Tensor] | None = None) -> Tensor:
        """Decode pixels.

        Args:
            embeddings: (B, h * w, P) from :meth:`VisionTower.embed_codes`.
            grid: (h, w).
            hidden_states: list to which the first layer's input and every layer's output are appended.

        Returns:
            (B, 3, h * p, w * p), unclamped, in the processor's normalised space.
        """
        x = embeddings + interpolate_positions(self.position_embeddings, self.trained, grid)
        rope = None if self.rope is None else self.rope(grid)
        x = self.encoder(x, rope=rope, hidden_states=hidden_states)
        patches = self.conv_out(self.ffn(self.norm(x)))  # (B, N, 3 * p * p), channel slowest
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, grid), self.patch_size)
