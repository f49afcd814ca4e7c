"""Text to image: a decoder over the tokenizer's tokens, as LlamaGen (arXiv 2406.06525).

`drawer` draws images from prompts with the settings of `settings`, or parts of images with `inpaint`; `growth` shows
them row by row; `drawing` draws the benchmarks of `qlip.evaluation.prompt_suites`; `task` trains a decoder on token
datasets, with `recipe` and `data`; `sequences` pairs captions with ids for other trainers.
"""

from qlip.t2i.drawer import Drawer, DrawerOutput
from qlip.t2i.drawing import Drawing
from qlip.t2i.sequences import CaptionedSequence, text_to_image
from qlip.t2i.settings import DrawSettings

__all__ = ["CaptionedSequence", "DrawSettings", "Drawer", "DrawerOutput", "Drawing", "text_to_image"]
