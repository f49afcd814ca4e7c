"""QLIP for transformers: importing this room registers the models with the Auto classes (extra ``hf``).

`QLIPHFModel` is the whole model, `QLIPHFVisionModel` the encoder alone, as LLaVA reads it, and `QLIPHFTextModel` the
text tower. All three hold the modules of `qlip.modeling` under their published names, so that weights and numbers are
equal. Images and text are prepared by transformers' own `CLIPImageProcessor`, `CLIPTokenizerFast` and `CLIPProcessor`.

A published folder says ``model_type: clip``, of which `AutoModel` makes a half-random CLIP without an error. Load it
with `QLIPHFModel.from_pretrained`; what its `save_pretrained` writes says ``qlip``, and `AutoModel` loads that right.
"""

from qlip.errors import require

require("transformers", extra="hf")

from qlip.hf.config import QLIPHFConfig, QLIPHFTextConfig, QLIPHFVisionConfig  # noqa: E402
from qlip.hf.model import QLIPHFModel, QLIPHFOutput, QLIPHFTextModel, QLIPHFVisionModel  # noqa: E402
from qlip.hf.processor import load_processor  # noqa: E402
from qlip.hf.register import register  # noqa: E402

register()

__all__ = [
    "QLIPHFConfig",
    "QLIPHFModel",
    "QLIPHFOutput",
    "QLIPHFTextConfig",
    "QLIPHFTextModel",
    "QLIPHFVisionConfig",
    "QLIPHFVisionModel",
    "load_processor",
]
