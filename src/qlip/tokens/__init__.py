"""Images as bits: packing, entropy coding and `.qlip` files."""

from qlip.tokens.entropy.coder import TokenCodec
from qlip.tokens.entropy.registry import TokenCodecs
from qlip.tokens.entropy.tables import Tables
from qlip.tokens.packing import pack, pack_batch, unpack, unpack_batch
from qlip.tokens.token_file import TokenFile, check_model

__all__ = [
    "Tables",
    "TokenCodec",
    "TokenCodecs",
    "TokenFile",
    "check_model",
    "pack",
    "pack_batch",
    "unpack",
    "unpack_batch",
]
