"""The encoder with 8-bit weights, for encoding in bulk on CPUs: faster, and some bits of the tokens differ.

Weights are quantised once, a scale an output channel; activations on the way, a scale a token. A scale a tensor, which
is what dynamic quantisation usually means, changes nearly twice as many bits of the tokens: one token of an image may
be many times as large as another. The bottleneck stays in float32: there a sign is a bit.

Shapes: (..., C) activations of C channels, (M, C) weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError
from qlip.modeling.model import QLIPModel

TINY = torch.finfo(torch.float32).tiny
Rounded = tuple[Tensor, Tensor]
"""uint8 (..., C) activations around a zero point, and the largest magnitude of each token, float32 (..., 1)."""


class Rounding(nn.Module):
    """Activations as 8-bit integers.

    Args:
        readers: layers that read one input, one after the other: the first rounds it for all, and after the last
            nothing of it is kept.
    """

    def __init__(self, readers: int = 1) -> None:
        super().__init__()
        self.readers, self._left = readers, 0
        # without VNNI two products of 8 bits may overflow the 16 bits they are added in: activations take 7 bits
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63
        self.zero_point = self.levels + 1
        self._last: tuple[Tensor, Rounded] | None = None

    def forward(self, x: Tensor) -> Rounded:
        """(..., C) float32, a scale a token."""
        if self._last is None or self._last[0] is not x:
            self._last, self._left = (x, self._rounded(x)), self.readers
        self._left -= 1
        rounded = self._last[1]
        if not self._left:
            self._last = None
        return rounded

    def _rounded(self, x: Tensor) -> Rounded:
        largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).clamp_min_(TINY)
        scaled = x * (self.levels / largest)
        return scaled.add_(self.zero_point + 0.5).to(torch.uint8), largest  # the cast rounds down


class Int8Linear(nn.Module):
    """A linear layer's product in 8-bit integers, summed in 32 bits; bias in float32.

    Args:
        linear: float32, on the CPU; its weight is copied.
        rounding: of its input.
    """

    def __init__(self, linear: nn.Linear, rounding: Rounding) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self._scales = (weight.abs().amax(1) / 127).clamp_min_(TINY)
        whole = (weight / self._scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(whole, None)
        self._zeros = torch.zeros(len(whole), dtype=torch.int64)
        self.rounding, self.bias = rounding, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) float32 to (..., M) float32."""
        whole, largest = self.rounding(x)
        scale, zero = 1 / self.rounding.levels, self.rounding.zero_point
        weight = self._packed, self._scales, self._zeros
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole, scale, zero, *weight, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product.mul_(largest) if self.bias is None else torch.addcmul(self.bias, product, largest)


def to_int8(model: QLIPModel) -> QLIPModel:
    """Put 8-bit products into the encoder's blocks, in place; decoder, text tower and bottleneck stay as they are.

    The model keeps its fingerprints: its tokens are meant to be the float32 model's, and about one bit in a hundred is
    not (docs/scale.md has the figures). It can neither be trained nor saved. Which bits depends on the processor.

    Args:
        model: float32, on the CPU, in eval mode.

    Returns:
        The same model.

    Raises:
        QLIPError: other weights or another device, or a PyTorch without oneDNN.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        kind = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
        raise QLIPError(f"int8 encoding is for float32 weights on a CPU, not {kind}; on a GPU take bfloat16")
    if not torch.backends.mkldnn.is_available():
        raise QLIPError("int8 encoding needs a PyTorch with oneDNN, which this build has not; take float32")
    fingerprints = model.code_fingerprint, model.decoder_fingerprint
    for layer in model.vision_model.encoder.layers:
        for module in list(layer.modules()):
            linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
            # all of a module's layers but its last, the way out, read the module's own input
            shared = Rounding(len(linears) - 1)
            for name, linear in linears.items():
                last = name == list(linears)[-1]
                setattr(module, name, Int8Linear(linear, Rounding() if last else shared))
    model._fingerprints.carry(model, {"codes": fingerprints[0], "decoder": fingerprints[1]})
    return model.requires_grad_(False)
