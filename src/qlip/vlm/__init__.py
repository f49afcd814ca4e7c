"""Language models that see: QLIP's encoder as the eye of a text decoder, as LLaVA (arXiv 2310.03744).

`model.VisionLanguageModel` is a tower, a projector and a text decoder, as `config.VLMConfig` describes; `batch` has its
batches, `images` prepares images, and `lora` adapts the decoder.
"""

from qlip.vlm.config import IGNORED, IMAGE_ID, VLMConfig
from qlip.vlm.model import VisionLanguageModel

__all__ = ["IGNORED", "IMAGE_ID", "VLMConfig", "VisionLanguageModel"]
