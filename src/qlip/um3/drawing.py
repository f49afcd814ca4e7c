"""A UM3 with everything that its images depend on beside prompt and number, as suites of prompts call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from qlip.errors import QLIPError
from qlip.lm.guidance import Guidance
from qlip.lm.sampling import Sampling
from qlip.modeling.checkpoint import Files
from qlip.um3.session import UM3Chat


@dataclass(frozen=True)
class UM3Drawing:
    """Draws images by prompt and number.

    Attributes:
        chat: to draw with.
        seed: of the noise.
        guidance, sampling: instead of the model's settings; None takes those.
    """

    chat: UM3Chat
    seed: int = 0
    guidance: Guidance | None = None
    sampling: Sampling | None = None

    at_once = 32

    def __call__(self, prompts: Sequence[str], numbers: Sequence[int]) -> list[Image.Image]:
        """See :data:`qlip.evaluation.prompt_suites.run.Draw`."""
        found = self.chat.generate(
            prompts,
            generation_mode="image",
            guidance=self.guidance,
            sampling=self.sampling,
            seed=self.seed,
            numbers=numbers,
        )
        return [image for [image] in found if isinstance(image, Image.Image)]

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.chat.name

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.chat.model.device

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that leave no room for an image. Raises QLIPError: names the first one."""
        length, cost = self.chat.model.config.decoder.length, self.chat.model.grammar.image_cost
        for prompt in prompts:
            if (ids := len(self.chat.encode(prompt))) + cost > length:
                raise QLIPError(
                    f"prompt {prompt!r:.60}: {ids:,} ids and an image of {cost:,} do not fit in the context of"
                    f" {length:,}"
                )

    def rebuild(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Encode and decode images by the model's tokenizer."""
        return self.chat.codec.decode(self.chat.codec.encode(images))

    @property
    def classes(self) -> list[str]:
        """Prompt of each class: none. Raises QLIPError always."""
        raise QLIPError(f"{self.name}: was not trained on classes, and suite adm draws them; choose another")

    def settings(self) -> dict[str, object]:
        """JSON of all that images depend on beside prompt and number; the model by its files' SHA-256."""
        sampling = self.chat.settings.sampling() if self.sampling is None else self.sampling
        return {
            "drawer": Files(self.name).digest(),
            "tokenizer": self.chat.codec.model.decoder_fingerprint,
            "dtype": str(self.chat.model.decoder.dtype).removeprefix("torch."),
            "seed": self.seed,
            "guidance": str(self.chat.guidance(self.guidance)),
            "negative": None,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
        }
