"""Export of decoders as folders that plain transformers loads: `decoder`, with a README by `readme`."""

from qlip.lm.export.decoder import (
    CLASSES,
    FORMATS,
    Format,
    block_of_stock_layer,
    check_export,
    export_decoder,
    halves,
    holds,
    stock_layer,
)

__all__ = [
    "CLASSES",
    "FORMATS",
    "Format",
    "block_of_stock_layer",
    "check_export",
    "export_decoder",
    "halves",
    "holds",
    "stock_layer",
]
