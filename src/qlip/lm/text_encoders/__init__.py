"""Text encoders, whose features per token are the condition of decoders with ``condition: features``.

`open_text_encoder` opens one by name (`encoders`); `CachedTextEncoder` keeps its features on disk, and `StoredFeatures`
reads those that LlamaGen's scripts wrote (`feature_files`). Pooled vectors are no condition: they hardly change when
the objects of a caption change places.
"""

from qlip.lm.text_encoders.base import TextEncoder, TransformerTextEncoder
from qlip.lm.text_encoders.encoders import open_text_encoder
from qlip.lm.text_encoders.feature_files import CachedTextEncoder, StoredFeatures

__all__ = ["CachedTextEncoder", "StoredFeatures", "TextEncoder", "TransformerTextEncoder", "open_text_encoder"]
