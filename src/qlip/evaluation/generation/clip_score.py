"""CLIP score: agreement of images with their captions according to a named scorer (Hessel et al., arXiv 2104.08718).

Three formulas carry this name, and their values differ by scale and by the words before a caption (`VARIANTS`). All
depend on the scorer, so the metric carries both names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricResult, mean
from qlip.evaluation.models.base import ENCODE_IMAGE, ENCODE_TEXT, EvalModel
from qlip.modeling.images import ImageInput
from qlip.registry import unknown_name
from qlip.runtime.finite import require_finite

PREFIX = "A photo depicts "


@dataclass(frozen=True)
class Variant:
    """A formula that is called CLIP score.

    Attributes:
        name: part of the metric's name; "" for the default.
        scale: factor of the cosine.
        clamped: negative cosines count as 0.
        prefix: words before each caption, which is then cut at the scorer's length.
    """

    name: str
    scale: float
    clamped: bool
    prefix: str = ""

    def score(self, cosines: Tensor) -> Tensor:
        """Scores of cosines, of any shape."""
        return self.scale * (cosines.clamp_min(0) if self.clamped else cosines)

    @property
    def formula(self) -> str:
        """The formula in words, for notes."""
        factor = "" if self.scale == 1 else f"{self.scale:g} "
        value = f"{factor}max(cos, 0)" if self.clamped else f"{factor}cos"
        return f"{value}, captions after {self.prefix!r}" if self.prefix else value


VARIANTS = {
    "torchmetrics": Variant("", 100, True),
    "hessel": Variant("hessel_", 2.5, True, PREFIX),
    "gigagan": Variant("gigagan_", 1, False, PREFIX),
}
"""By name: torchmetrics' and most papers'; the paper's own CLIP-S, with its prefix; GigaGAN's, LlamaGen's and the QLIP
paper's mean cosine (about 0.3). GigaGAN puts the prefix's three ids behind the begin token and cuts at 77 ids with the
end token last; ids of the prefixed caption are the same, as CLIP's vocabulary splits at spaces."""
ENCODER = 20
"""Leading hex digits of a QLIP's fingerprint that depend on its encoder alone."""


def clip_score(
    scorer: EvalModel,
    images: Iterable[ImageInput],
    texts: Sequence[str],
    *,
    tokenizer: EvalModel | str | None,
    variant: str = "torchmetrics",
    batch_size: int = 32,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> MetricResult:
    """Mean score of pairs of image and text, with its interval.

    Args:
        scorer: embeds images and reads words; images are prepared as it wants them.
        images: as many as texts.
        texts: what each image was to show.
        tokenizer: of the generator that made the images, or its fingerprint; None where it had none. A scorer that
            is the same model has seen its own idea of an image rewarded, and the note says so.
        variant: formula, out of `VARIANTS`.
        batch_size: pairs at once.
        seed: of the bootstrap.
        advance: called with the number of images scored.

    Returns:
        ``clip_score_<scorer>``, or ``clip_score_<variant>_<scorer>``, and under ``scores`` a table of pairs.

    Raises:
        QLIPError: no such variant, the scorer cannot embed or read, images and texts are not as many, or a score is no
            number.
    """
    if variant not in VARIANTS:
        raise unknown_name(variant, "variant of the CLIP score", VARIANTS)
    chosen = VARIANTS[variant]
    if missing := sorted({ENCODE_IMAGE, ENCODE_TEXT} - scorer.capabilities):
        raise QLIPError(
            f"CLIP score: {scorer.name} cannot {' or '.join(missing).replace('_', ' ')}; choose another scorer"
        )
    if not texts:
        raise QLIPError("CLIP score: there is no text")
    scores: list[float] = []
    for some, words in _pairs(images, texts, batch_size):
        loaded = [scorer.preprocessing.load(one, f"image {len(scores) + at}") for at, one in enumerate(some)]
        preparation = scorer.preprocessing
        pixels = torch.stack([preparation.pixels(preparation.resized(image)) for image in loaded])
        with torch.inference_mode():
            seen, read = (
                scorer.encode_image(pixels.to(scorer.device)),
                scorer.encode_text([chosen.prefix + one for one in words]),
            )
        named = [f"image {len(scores) + at}" for at in range(len(words))]
        require_finite(seen, "embeddings", f"the output of {scorer.name} is broken", named)
        require_finite(read, "embeddings", f"the output of {scorer.name} is broken", [repr(one) for one in words])
        cosines = (seen * read).sum(-1)
        scores += chosen.score(cosines.double()).tolist()
        advance(len(words))
    name = f"clip_score_{chosen.name}" + re.sub(r"[^A-Za-z0-9]+", "-", scorer.name).strip("-")
    found = MetricResult({name: mean(torch.tensor(scores, dtype=torch.float64), better="higher", seed=seed)})
    found.notes[name] = f"scored by {scorer.name} ({scorer.fingerprint[:16]}), {chosen.formula}"
    if same_judge(scorer, tokenizer):
        found.notes[name] += "; the scorer is the generator's own tokenizer: it judges its own images"
    found.tables["scores"] = [{"text": text, name: score} for text, score in zip(texts, scores, strict=True)]
    return found


def same_judge(scorer: EvalModel, tokenizer: EvalModel | str | None) -> bool:
    """Return True if the scorer is the model whose tokens the images were generated from, by fingerprints."""
    if tokenizer is None:
        return False
    other = tokenizer if isinstance(tokenizer, str) else tokenizer.fingerprint
    return bool(other) and scorer.fingerprint[:ENCODER] == other[:ENCODER]


def _pairs(
    images: Iterable[ImageInput], texts: Sequence[str], batch_size: int
) -> Iterator[tuple[list[ImageInput], list[str]]]:
    """Batches of both; refused at the end where one runs out before the other."""
    remaining, given = iter(images), 0
    words = iter(texts)
    while some := list(islice(remaining, batch_size)):
        given += len(some)
        mine = list(islice(words, len(some)))
        if len(mine) < len(some):
            raise QLIPError(f"CLIP score: more images than the {len(texts)} texts; give one for each image")
        yield some, mine
    if given < len(texts):
        raise QLIPError(f"CLIP score: {given} images for {len(texts)} texts; give one for each image")
