"""Models under evaluation.

`EvalModel` is the interface: reconstruct, encode_image, encode_text, features, tokenize, as far as a model has them.
`QLIPEvalModel` is a QLIP checkpoint, `CodecEvalModel` JPEG, WebP or AVIF, `PairedFiles` reconstructions on disk;
`adapters` opens models of other libraries, with `clip`. A `ModelBatch` holds a batch with the outputs
of one model on it.
"""
