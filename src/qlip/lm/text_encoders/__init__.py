"""Text encoders, whose features per token are the condition of decoders with ``condition: features``.

`open_text_encoder` opens one by name (`encoders`); `CachedTextEncoder` keeps its features on disk, and `StoredFeatures`
reads those that LlamaGen's scripts wrote (`feature_files`). Pooled vectors are no condition: they hardly change when
the objects of a caption change places.
"""

from qlip.lm.text_encoders.encoders import TextEncoder, TransformerTextEncoder, open_text_encoder
from qlip.lm.text_encoders.feature_files import CachedTextEncoder

__all__ = ["CachedTextEncoder", "TextEncoder", "TransformerTextEncoder", "open_text_encoder"]
