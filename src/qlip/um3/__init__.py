"""One autoregressive model over text and images: UM3 (arXiv 2502.05178).

`model.UM3` is a text decoder whose vocabulary ends with the values of QLIP's groups, as `config.UM3Config` describes.
`sequence.Grammar` says which id may follow which, and which softmax a target belongs to; `sequence.image_ids` and
`indices_of` turn an image's indices into ids and back. `batch` has the batches that it trains on: rows of packed
documents of text, images, or both. `generate` continues sequences of ids, and `session.UM3Chat` conversations of text
and images.
"""

from qlip.um3.config import UM3Config
from qlip.um3.generate import generate
from qlip.um3.model import UM3
from qlip.um3.sequence import Grammar, image_ids, indices_of
from qlip.um3.session import UM3Chat

__all__ = ["UM3", "Grammar", "UM3Chat", "UM3Config", "generate", "image_ids", "indices_of"]
