"""A drawer with everything that its images depend on beside prompt and number, as suites call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from qlip.errors import QLIPError
from qlip.lm.guidance import Guidance
from qlip.lm.sampling import Sampling
from qlip.modeling.checkpoint import Files
from qlip.t2i.drawer import Drawer
from qlip.t2i.prompts import ClassPrompts


@dataclass(frozen=True)
class Drawing:
    """Draws images by prompt and number.

    Attributes:
        drawer: to draw with.
        seed: of the noise.
        guidance, sampling: instead of the drawer's settings; None takes those.
        negative: prompt that guidance leads away from.
    """

    drawer: Drawer
    seed: int = 0
    guidance: Guidance | None = None
    sampling: Sampling | None = None
    negative: str | None = None

    def __call__(self, prompts: Sequence[str], numbers: Sequence[int]) -> list[Image.Image]:
        """See :data:`qlip.evaluation.prompt_suites.run.Draw`."""
        indices = self.drawer.draw(
            self.drawer.condition(prompts),
            guidance=self.guidance,
            sampling=self.sampling,
            negative=None if self.negative is None else self.drawer.condition([self.negative]),
            seed=self.seed,
            numbers=numbers,
        )
        return self.drawer.images(indices)

    @property
    def at_once(self) -> int:
        """Images that are drawn together."""
        return self.drawer.AT_ONCE

    @property
    def name(self) -> str:
        """Name of the drawer."""
        return self.drawer.name

    @property
    def device(self) -> torch.device:
        """Device of the drawer."""
        return self.drawer.decoder.device

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that the drawer cannot draw. Raises QLIPError: names the first one."""
        self.drawer.prompts.check(prompts)

    def rebuild(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Encode and decode images by the drawer's tokenizer."""
        return self.drawer.codec.decode(self.drawer.codec.encode(images))

    @property
    def classes(self) -> list[str]:
        """Prompt of each class. Raises QLIPError: the drawer was not trained on classes."""
        if isinstance(self.drawer.prompts, ClassPrompts):
            return self.drawer.prompts.names
        if not self.drawer.settings.classes:
            raise QLIPError(f"{self.drawer.name}: was not trained on classes, and suite adm draws them; choose another")
        return list(self.drawer.settings.classes.values())

    def settings(self) -> dict[str, object]:
        """JSON of all that images depend on beside prompt and number; the drawer by its files' SHA-256."""
        sampling = self.sampling or self.drawer.settings.sampling()
        return {
            "drawer": Files(self.drawer.name).digest(),
            "tokenizer": self.drawer.codec.model.decoder_fingerprint,
            "dtype": str(self.drawer.decoder.dtype).removeprefix("torch."),
            "seed": self.seed,
            "guidance": str(self.drawer.schedule(self.guidance)),
            "negative": self.negative,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
        }
