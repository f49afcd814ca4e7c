"""Images as bits: packing, entropy coding and `.qlip` files."""

from qlip.tokens.entropy.coder import TokenCodec
from qlip.tokens.entropy.registry import TokenCodecs
from qlip.tokens.entropy.tables import Tables
from qlip.tokens.image_codec import Fit, ImageCodec, Prepared
from qlip.tokens.packing import pack, pack_batch, unpack, unpack_batch
from qlip.tokens.token_file import TokenFile, check_model

__all__ = [
    "Fit",
    "ImageCodec",
    "Prepared",
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
