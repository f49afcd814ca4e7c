"""Tokens outside the model: packed bits, entropy coding, `.qlip` files, and the way from image to tokens and back.

`pack` turns indices into bytes. A `TokenFile` is one image's packed tokens with the fingerprints of its model.
`ImageCodec` encodes images to token files and decodes them; `Fit` says how an image is fitted to the model.
`TokenCodec` entropy-codes packed tokens with a model's `Tables`; `TokenCodecs` finds the coder that a file needs.
"""

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
