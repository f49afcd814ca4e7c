"""Export a model as ONNX graphs, which run without this package."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError, require
from qlip.files import folder_written_aside
from qlip.modeling.model import QLIPModel


class EncodeGraph(nn.Module):
    """``model.encode`` as a module: (B, 3, H, W) floating to (B, N, K) int64."""

    def __init__(self, model: QLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See :meth:`QLIPModel.encode`."""
        return self.model.encode(pixel_values)


class DecodeGraph(nn.Module):
    """``model.decode`` as a module, for the trained grid: (B, N, K) int64 to (B, 3, H, W) floating."""

    def __init__(self, model: QLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, indices: Tensor) -> Tensor:
        """See :meth:`QLIPModel.decode`."""
        return self.model.decode(indices, self.model.grid)


def require_packages() -> None:
    """Check the packages that :func:`export_onnx` needs. Raises QLIPError."""
    require("onnx", extra="export")
    require("onnxscript", extra="export")


def export_onnx(model: QLIPModel, folder: Path) -> list[Path]:
    """Write ``encode.onnx`` and ``decode.onnx`` for images of the trained size, with any batch size.

    ``encode`` maps ``pixel_values``, float32 in the processor's normalised space, to ``indices``, int64; ``decode``
    maps ``indices`` to ``pixel_values``. Weights that a graph cannot hold (2 GB) lie in ``NAME.onnx.data`` beside it.

    Args:
        model: float32, in eval mode.
        folder: created if absent.

    Returns:
        The written files, sorted by name.

    Raises:
        QLIPError: the packages of ``qlip[export]`` are absent, or the weights are not float32.
    """
    require_packages()
    if model.dtype != torch.float32:
        raise QLIPError(
            f"ONNX export needs float32 weights, these are {model.dtype}; load them with dtype=torch.float32"
        )
    names = {"encode": ("pixel_values", "indices"), "decode": ("indices", "pixel_values")}
    with folder_written_aside(folder) as aside:  # a graph names its file of weights, which is saved beside it
        for name, (graph, example) in _graphs(model).items():
            source, target = names[name]
            with _silence_exporter_warnings():
                program = torch.onnx.export(
                    graph,
                    (example,),
                    input_names=[source],
                    output_names=[target],
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    dynamo=True,
                    verbose=False,
                )
            assert program is not None
            program.save(aside / f"{name}.onnx")
        written = sorted(path.name for path in aside.iterdir())
    return [folder / name for name in written]


@contextmanager
def _silence_exporter_warnings() -> Iterator[None]:
    """Suppress two harmless warnings of torch.onnx: absent torchvision, and its own use of a deprecated function."""

    def is_relevant(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed. Skipping torchvision::")

    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    log.addFilter(is_relevant)
    try:
        with warnings.catch_warnings():
            deprecated = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
            warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
            yield
    finally:
        log.removeFilter(is_relevant)


def _graphs(model: QLIPModel) -> dict[str, tuple[nn.Module, Tensor]]:
    """Both graphs, each with an example of its input: two images, since a batch of one would become a constant."""
    channels, side = model.config.vision_config.num_channels, model.image_size
    pixels = torch.zeros(2, channels, side, side, dtype=model.dtype, device=model.device)
    indices = torch.zeros(2, model.grid[0] * model.grid[1], model.num_groups, dtype=torch.int64, device=model.device)
    return {"encode": (EncodeGraph(model).eval(), pixels), "decode": (DecodeGraph(model).eval(), indices)}
