"""QLIP: a visual tokenizer aligned with text.

Public names load on first use, so that ``qlip --help`` and shell completion do not wait for PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlip.errors import QLIPError

if TYPE_CHECKING:
    from qlip.modeling import (
        QLIPConfig,
        QLIPModel,
        QLIPOutput,
        QLIPProcessor,
        bits_to_indices,
        indices_to_bits,
        regroup,
    )
    from qlip.t2i import Drawer
    from qlip.tokens import ImageCodec, TokenFile

__version__ = "0.2.0.dev0"

__all__ = [
    "Drawer",
    "ImageCodec",
    "QLIPConfig",
    "QLIPError",
    "QLIPModel",
    "QLIPOutput",
    "QLIPProcessor",
    "TokenFile",
    "__version__",
    "bits_to_indices",
    "indices_to_bits",
    "regroup",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the room that defines it (PEP 562)."""
    if name in ("ImageCodec", "TokenFile"):
        from qlip import tokens

        return getattr(tokens, name)
    if name == "Drawer":
        from qlip import t2i

        return t2i.Drawer
    if name in __all__:
        from qlip import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module 'qlip' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted(__all__)
