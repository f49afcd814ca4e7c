"""The tokenizer itself: plain PyTorch, checkpoints in Hugging Face's layout."""

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
