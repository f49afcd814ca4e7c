"""Images as bits: packing, entropy coding and `.qlip` files."""

from qlip.tokens.codecs import TokenCodecs
from qlip.tokens.coder import TokenCodec
from qlip.tokens.container import TokenFile, check_model
from qlip.tokens.packing import pack, pack_batch, unpack, unpack_batch
from qlip.tokens.tables import Tables

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
