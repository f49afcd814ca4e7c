"""A drawer as a pipeline of diffusers: the two classes that the files of an exported folder build on.

`DrawerComponent` is the pipeline's one component, which diffusers loads and moves; `DrawerCall` is the pipeline's call.
`qlip.t2i.export` writes the folder. Nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from qlip.t2i.drawer import Drawer


class DrawerComponent(nn.Module):
    """A `Drawer` that moves to another device or precision by loading its folder again, as packed weights do not move.

    Args:
        folder: of the drawer.
        device: see :meth:`Drawer.from_pretrained`.
        dtype: of the weights.
    """

    def __init__(self, folder: str | Path, device: str | torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.folder = folder
        self._load(torch.device(device), dtype)

    def _load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.drawer = Drawer.from_pretrained(self.folder, device=device, dtype=dtype)
        self.decoder, self.tokenizer = self.drawer.decoder, self.drawer.codec.model
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None) -> Self:
        """Load a drawer's folder to the CPU; called by diffusers.

        Raises:
            QLIPError: see :meth:`Drawer.from_pretrained`.
        """
        return cls(folder, "cpu", torch_dtype or torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.decoder.dtype

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Self:  # type: ignore[override]
        """Move to a device, a precision, or both; called by diffusers."""
        place, kind = torch.device(device or self.device), dtype or self.dtype
        here = place.type == self.device.type and place.index in (None, self.device.index)
        if not here or kind != self.dtype:
            self._load(place, kind)
        return self


class DrawerCall:
    """The call of a pipeline that has a `DrawerComponent`, named ``drawer``, and diffusers' progress bars."""

    drawer: DrawerComponent
    progress_bar: Callable[..., Any]

    @wraps(Drawer.__call__)
    def __call__(
        self, prompt: Any, *args: Any, callback_on_step_end: Callable[..., Any] | None = None, **options: Any
    ) -> Any:
        """Draw images, with the arguments of a `Drawer`; the callback has this pipeline as first argument."""
        drawer = self.drawer.drawer
        images = options.get("num_images_per_prompt", 1) * (1 if isinstance(prompt, str) else len(prompt))
        batches = -(-images // drawer.AT_ONCE)
        with self.progress_bar(total=batches * drawer.decoder.config.num_steps) as bar:

            def on_step_end(_: Drawer, step: int, timestep: int, values: dict[str, Any]) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, timestep, values)

            options["callback_on_step_end"] = on_step_end
            return drawer(prompt, *args, **options)
