"""Images as bits: packing and `.qlip` files."""

from qlip.tokens.container import TokenFile, check_model
from qlip.tokens.packing import pack, pack_batch, unpack, unpack_batch

__all__ = ["TokenFile", "check_model", "pack", "pack_batch", "unpack", "unpack_batch"]
