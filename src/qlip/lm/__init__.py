"""Language models: a decoder transformer that predicts an image's indices from a condition, and one of text.

`DecoderConfig` describes a `DecoderModel` (`config`, `model`): a prefix of the `Condition` (`conditions`), transformer
blocks (`transformer`, `rotary`), and a head that models the groups of a token (`heads`). `text_encoders` turn captions
into features for conditions. `generate` draws indices, with `Sampling` and `Guidance`. `sequences.SequenceLayout` says
how an image's indices become the ids of another language model, and back. `CausalModel` (`causal`, `causal_config`) is
the decoder of text, made of the same blocks, which reads and writes the folders of a stock Llama or Qwen3; `complete`
continues text with it, `LLMTokenizer` (`tokenizer`) encodes its text, and `vocabulary` trains small tokenizers. The
room knows `modeling` and `tokens`, but no datasets and no training.
"""

from qlip.lm.causal import CausalModel
from qlip.lm.causal_config import CausalConfig
from qlip.lm.complete import complete
from qlip.lm.conditions import Condition
from qlip.lm.config import DecoderConfig
from qlip.lm.generate import generate, generate_jacobi
from qlip.lm.guidance import Guidance
from qlip.lm.model import DecoderModel
from qlip.lm.packed import pack
from qlip.lm.sampling import Sampling
from qlip.lm.sequences import GroupOrder, SequenceLayout
from qlip.lm.tokenizer import LLMTokenizer

__all__ = [
    "CausalConfig",
    "CausalModel",
    "Condition",
    "DecoderConfig",
    "DecoderModel",
    "GroupOrder",
    "LLMTokenizer",
    "Guidance",
    "Sampling",
    "SequenceLayout",
    "complete",
    "generate",
    "generate_jacobi",
    "pack",
]
