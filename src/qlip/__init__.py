"""QLIP: a visual tokenizer aligned with text."""

from qlip.errors import QLIPError
from qlip.modeling import (
    QLIPConfig,
    QLIPModel,
    QLIPOutput,
    QLIPProcessor,
    bits_to_indices,
    indices_to_bits,
    regroup,
)

__version__ = "0.1.0"

__all__ = [
    "QLIPConfig",
    "QLIPError",
    "QLIPModel",
    "QLIPOutput",
    "QLIPProcessor",
    "__version__",
    "bits_to_indices",
    "indices_to_bits",
    "regroup",
]
