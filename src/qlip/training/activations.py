"""What a training step keeps for its backward pass, in bytes, from the architecture alone.

c is the size of a number in products: 2 with bfloat16 autocast, 4 without. D is a tower's width, I its inner width.

A block keeps for each token: ``8 D``, the inputs of its two norms; ``4 c D``, queries, keys, values and their mixture;
the inputs of its products, which autocast casts once for each product and which are shared otherwise: of queries, keys
and values, of the output, of the MLP; ``c I`` or, with a gate, ``3 c I`` before the last product and ``c I`` as its
input. Sub-LN norms the MLP's ``4 I``, and with autocast ``4 D`` are kept apart from the mixture. Norms' statistics and
attention's normalisers are less than a hundredth of that and left out.

With activation checkpointing a block keeps its input, ``4 D``, and one block at a time is filled again. While a block
is gone through backwards the gradients inside it are about half as large as what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.modeling import QLIPConfig
from qlip.modeling.config import TowerConfig

FLOAT = 4
LPIPS_PIXEL = 3211
"""Most bytes a pixel that LPIPS over VGG16 takes with its gradient, in float32 always; a test measures it."""


@dataclass(frozen=True)
class Bytes:
    """Of a stretch of a network, for one sample or a batch.

    Attributes:
        kept: until the backward pass has come by.
        peak: most that exists at once, forwards or backwards, what is kept included.
    """

    kept: int = 0
    peak: int = 0

    def __add__(self, later: Bytes) -> Bytes:
        """One stretch after the other: the later one's is all gone when the backward pass comes to the earlier one."""
        return Bytes(self.kept + later.kept, max(self.peak, self.kept + later.peak))

    def times(self, samples: int) -> Bytes:
        """Of so many samples."""
        return Bytes(samples * self.kept, samples * self.peak)


def block_bytes(config: TowerConfig, compute: int) -> int:
    """What a block keeps of a token.

    Args:
        config: of the tower.
        compute: bytes of a number in products, 2 or 4.
    """
    width, inner, copies = config.hidden_size, config.intermediate_size, compute < FLOAT
    gated = 2 if config.swiglu else 1
    # queries, keys, values, mixture; inputs of three products, of the output, of the MLP's first one or two
    products = 4 + (3 + 1 + gated if copies else 1 + 0 + 1)
    kept = 2 * FLOAT * width + products * compute * width
    kept += (3 if config.swiglu else 1) * compute * inner + compute * inner
    if config.subln:
        kept += FLOAT * inner + (FLOAT if copies else compute) * width
    return kept


def tower_bytes(config: TowerConfig, tokens: int, compute: int, checkpointing: bool, frozen: bool = False) -> Bytes:
    """A tower's blocks.

    Args:
        config: of the tower.
        tokens: of one sample.
        compute: bytes of a number in products.
        checkpointing: only the blocks' inputs are kept.
        frozen: run without a graph, so that one block's numbers exist at a time.
    """
    block = tokens * block_bytes(config, compute)
    if frozen:
        return Bytes(0, block // 2)
    kept = config.num_hidden_layers * (tokens * FLOAT * config.hidden_size if checkpointing else block)
    return Bytes(kept, kept + block // 2 + (block if checkpointing else 0))


def encoder_bytes(config: QLIPConfig, compute: int, checkpointing: bool, frozen: bool = False) -> Bytes:
    """Pixels to the last block's output, for one image: patches are unfolded and cast, positions added."""
    vision = config.vision_config
    pixels, tokens = vision.num_channels * vision.image_size**2, vision.grid_size**2 + 1
    tower = tower_bytes(vision, tokens, compute, checkpointing, frozen)
    patches = pixels * (FLOAT + (compute if compute < FLOAT else 0))
    return Bytes(FLOAT * pixels, FLOAT * pixels) + Bytes(0 if frozen else patches, patches) + tower


def bottleneck_bytes(config: QLIPConfig, compute: int) -> Bytes:
    """Both sides of the bottleneck and the quantizer's entropies, for one image.

    Either side keeps its input and the hidden numbers before and after its activation; the joint distribution of a
    group of bits grows bit by bit in two halves, each of which keeps all its stages.
    """
    vision = config.vision_config
    bits, group, post = vision.quantizer_cfg.embed_dim, vision.quantizer_cfg.group_size, vision.post_size
    down = 3 * compute * vision.hidden_size if vision.quantizer_embed_type == "mlp" else 0
    up = 2 * compute * post
    tables = (bits // group) * sum(2 ** (half + 1) + 4 * half for half in (group // 2, group - group // 2))
    scalars = 12 * bits
    kept = vision.grid_size**2 * (down + up + FLOAT * (tables + scalars))
    return Bytes(kept, kept)


def decoder_bytes(config: QLIPConfig, compute: int, checkpointing: bool) -> Bytes:
    """The bottleneck's output to pixels and their squared error, for one image."""
    decoder = config.decoder_config
    tokens, pixels = decoder.grid_size**2, 3 * decoder.image_size**2
    head = tokens * (FLOAT * decoder.hidden_size + compute * (decoder.hidden_size + decoder.intermediate_size))
    # rebuilt, once more in full where autocast made it short, and the difference; for a moment its square and gradient
    error = pixels * (compute + (FLOAT if compute < FLOAT else 0) + FLOAT)
    last = Bytes(head + error, head + error + 2 * FLOAT * pixels)
    return tower_bytes(decoder, tokens, compute, checkpointing) + last


def text_bytes(config: QLIPConfig, compute: int, checkpointing: bool, frozen: bool = False) -> Bytes:
    """Tokens to the pooled output, for one text of full length."""
    text = config.text_config
    tower = tower_bytes(text, text.max_position_embeddings, compute, checkpointing, frozen)
    norm = 0 if frozen else 2 * FLOAT * text.max_position_embeddings * text.hidden_size
    return tower + Bytes(norm, norm)


def judged_bytes(side: int, pixel: float) -> Bytes:
    """A judge of one rebuilt image, whose gradient is taken at once and whose graph is dropped.

    Args:
        side: of the image.
        pixel: bytes a pixel that the judge takes; what stays are the image as the judge sees it and the gradient.
    """
    kept = 2 * 3 * FLOAT * side**2
    return Bytes(kept, kept + round(pixel * side**2))


def graph_bytes(make: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """What a graph keeps, found out by making it: for small networks of many kinds of layers.

    Args:
        make: runs a network.
        held: tensors that exist anyway, such as its parameters.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: list[Tensor] = []  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = make()
    del made
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)
