"""Made scenes as tokens, drawn and encoded while they are read: no layout comes twice.

The scene at position n is scene n of a split of `qlip.data.public.scene_captions`, or that of question n of a split of
`qlip.data.public.scene_questions`. The captioned scenes of epoch 2 and later are new samples of the same distribution
too; questions come again after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from qlip.archive.dataset.stream import TokenBatch
from qlip.data.loader.sampler import Numbers
from qlip.data.public import scene_captions, scene_questions
from qlip.data.public.scene_captions import CaptionedScenes
from qlip.data.public.scene_questions import KINDS, SceneQuestions, text_and_answer
from qlip.data.public.scenes import draw
from qlip.errors import QLIPError
from qlip.modeling.indices import regroup
from qlip.registry import unknown_name
from qlip.tokens.image_codec import ImageCodec, codec_of_process


@dataclass(frozen=True)
class DrawnScenes:
    """Draws and encodes the scenes at positions on the CPU; pickles into workers.

    Attributes:
        split: of the scenes, or of the questions.
        tokenizer: checkpoint that encodes them.
        group_size: bits per group; None is the tokenizer's.
        questions: scenes with a question; its caption is the question, a space and the answer, its label the kind.
    """

    split: str
    tokenizer: str
    group_size: int | None
    questions: bool = False

    def check(self) -> None:
        """Load the tokenizer, and check the split and the group size.

        Raises:
            QLIPError: no such split or checkpoint, or a group size that does not divide the bits of a token.
        """
        splits = scene_questions.LENGTHS if self.questions else scene_captions.SPLITS
        if self.split not in splits:
            noun = "questions about made scenes" if self.questions else "the made scenes"
            raise unknown_name(self.split, f"split of {noun}", splits)
        model = self.codec.model
        bits = self.group_size or model.group_size
        if model.num_bits % bits:
            raise QLIPError(f"group_size {bits} does not divide {model.num_bits} bits, a token of {self.tokenizer}")

    @property
    def name(self) -> str:
        """Name of the scenes, for messages."""
        return f"questions:{self.split}" if self.questions else f"scenes:{self.split}"

    @property
    def codec(self) -> ImageCodec:
        """The tokenizer."""
        return codec_of_process(self.tokenizer)

    @torch.no_grad()
    def batch(self, positions: Numbers) -> TokenBatch:
        """Draw and encode the scenes at positions, int64 (B,)."""
        model, preprocessing = self.codec.model, self.codec.processor.preprocessing
        lengths = scene_questions.LENGTHS if self.questions else scene_captions.LENGTHS
        read = self._question if self.questions else self._scene
        found = [read(position) for position in positions.tolist()]
        pixels = [preprocessing.pixels(preprocessing.resized(image)) for image, *_ in found]
        indices = model.encode(torch.stack(pixels))
        return TokenBatch(
            indices=regroup(indices, self.group_size or model.group_size, from_group_size=model.group_size),
            rows=torch.from_numpy(positions),
            epochs=torch.from_numpy(positions // lengths[self.split]),
            keys=[key for *_, key in found],
            captions=[(text,) for _, text, *_ in found],
            labels=[label for *_, label, _ in found],
        )

    def texts(self, count: int) -> list[str]:
        """Captions of the first scenes, without drawing them."""
        if not self.questions:
            scenes = CaptionedScenes(self.split)
            return [scenes.scene(number)[0].caption for number in range(count)]
        numbers = range(min(count, scene_questions.LENGTHS[self.split]))
        return [" ".join(text_and_answer(KINDS[number % len(KINDS)], self.split, number)) for number in numbers]

    def _scene(self, position: int) -> tuple[Image.Image, str, str, str]:
        scenes = CaptionedScenes(self.split)
        description, scene = scenes.scene(position)
        return draw(scene), description.caption, description.family, scenes.key(position)

    def _question(self, position: int) -> tuple[Image.Image, str, str, str]:
        question = SceneQuestions(self.split)[position % scene_questions.LENGTHS[self.split]]
        return question.image(), f"{question.text} {question.answer}", question.kind, question.key
