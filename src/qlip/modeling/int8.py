"""Encoder with 8-bit weights, for encoding in bulk on CPUs: faster, but some bits of the tokens differ.

Weights are quantised once, with a scale per output channel; activations on the fly, with a scale per token. The usual
dynamic quantisation has one scale per tensor and changes nearly twice as many bits of the tokens, since the tokens of
an image differ much in magnitude. The bottleneck stays in float32, because its signs are the bits. torchao has the
same scheme, which is slower unless it is compiled (docs/log.md has the numbers).

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
    """Rounding of activations to 8-bit integers, shared by layers with one input.

    Args:
        readers: number of layers that read the same input in turn; the result is cached until the last has read it.
    """

    def __init__(self, readers: int = 1) -> None:
        super().__init__()
        self.readers, self._left = readers, 0
        # without VNNI the sum of two 8-bit products may overflow its 16 bits: activations take 7 bits
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63
        self.zero_point = self.levels + 1
        self._last: tuple[Tensor, Rounded] | None = None

    def forward(self, x: Tensor) -> Rounded:
        """Round (..., C) float32 with a scale per token."""
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
        return scaled.add_(self.zero_point + 0.5).to(torch.uint8), largest  # the cast truncates


class Int8Linear(nn.Module):
    """Linear layer with 8-bit products, summed in 32 bits, and a float32 bias.

    Args:
        linear: float32 layer on the CPU; its weight is copied.
        rounding: rounding of its input.
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
    """Replace the linear layers of the encoder's blocks by `Int8Linear`, in place.

    Decoder, text tower and bottleneck stay in float32. The model keeps its fingerprints, although about one bit in a
    hundred of its tokens differs from the float32 model's (docs/scale.md has the numbers); which ones depends on the
    processor. The model can neither be trained nor saved.

    Args:
        model: float32, on the CPU, in eval mode.

    Returns:
        The same model.

    Raises:
        QLIPError: weights of another dtype, another device, or a PyTorch without oneDNN.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        kind = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
        raise QLIPError(f"int8 encoding needs float32 weights on a CPU, not {kind}; on a GPU use bfloat16")
    if not torch.backends.mkldnn.is_available():
        raise QLIPError("int8 encoding needs a PyTorch with oneDNN, and this build has none; use float32")
    fingerprints = model.code_fingerprint, model.decoder_fingerprint
    for layer in model.vision_model.encoder.layers:
        for module in list(layer.modules()):
            linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
            # all layers of a module except its last read the module's own input
            shared = Rounding(len(linears) - 1)
            for name, linear in linears.items():
                last = name == list(linears)[-1]
                setattr(module, name, Int8Linear(linear, Rounding() if last else shared))
    model._fingerprints.carry(model, {"codes": fingerprints[0], "decoder": fingerprints[1]})
    return model.requires_grad_(False)
