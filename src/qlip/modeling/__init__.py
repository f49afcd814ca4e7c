"""The tokenizer: plain PyTorch, with checkpoints in Hugging Face's layout.

`QLIPProcessor` turns images and text into tensors. `QLIPModel` has a vision tower, whose last layer a `Quantizer` turns
into codes (`BinarySphericalQuantizer`: one sign per bit), a decoder from codes to pixels, and a text tower; all three
are stacks of transformer blocks (`Encoder` of `Layer`s). `encode` gives integer `indices` (B, N, K), `decode` gives
pixels, `embed_images` and `embed_texts` give vectors in one space. A `QLIPConfig` fixes all sizes; `convert` builds a
model from other projects' towers, and `fingerprint` identifies the parts of a model by their weights.
"""

from qlip.modeling.config import QLIPConfig, QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig, QuantizerConfig
from qlip.modeling.images import load_image, to_images, to_uint8
from qlip.modeling.indices import bits_to_indices, indices_to_bits, regroup
from qlip.modeling.model import QLIPModel, QLIPOutput
from qlip.modeling.processor import Preprocessing, QLIPProcessor
from qlip.modeling.quantizer import BinarySphericalQuantizer, Quantizer, QuantizerOutput, bsq_entropies
from qlip.modeling.tokenizer import CLIPTokenizer

__all__ = [
    "BinarySphericalQuantizer",
    "CLIPTokenizer",
    "Preprocessing",
    "QLIPConfig",
    "QLIPDecoderConfig",
    "QLIPModel",
    "QLIPOutput",
    "QLIPProcessor",
    "QLIPTextConfig",
    "QLIPVisionConfig",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "bits_to_indices",
    "bsq_entropies",
    "indices_to_bits",
    "load_image",
    "regroup",
    "to_images",
    "to_uint8",
]
