"""UM3: one autoregressive model over text and image tokens (arXiv 2502.05178, section 4.3).

`qlip.um3.batch` has the batches that it trains on: rows of packed documents of text, images, or both.
"""
