"""A model as graphs that run without this package: ``torch.export`` and ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError, require
from qlip.files import written_aside
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


def export_graphs(model: QLIPModel) -> dict[str, torch.export.ExportedProgram]:
    """``encode`` and ``decode`` by ``torch.export``, for images of the trained size, any number at once.

    Args:
        model: in eval mode.
    """
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        return {
            name: torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
            for name, (module, example) in _graphs(model).items()
        }


def export_onnx(model: QLIPModel, folder: Path, report: Callable[[Path], None] = lambda path: None) -> list[Path]:
    """Write ``encode.onnx`` and ``decode.onnx``, for images of the trained size, any number at once.

    ``encode`` reads ``pixel_values``, float32 in the processor's normalised space, and gives ``indices``, int64;
    ``decode`` the other way round.

    Args:
        model: float32, in eval mode.
        folder: made if absent.
        report: called with each file when it is written.

    Raises:
        QLIPError: the packages of ``qlip[export]`` are absent, or the weights are not float32.
    """
    for module in ("onnx", "onnxscript"):
        require(module, extra="export")
    if model.dtype != torch.float32:
        raise QLIPError(
            f"ONNX export needs float32 weights, these are {model.dtype}; load them with dtype=torch.float32"
        )
    paths = []
    names = {"encode": ("pixel_values", "indices"), "decode": ("indices", "pixel_values")}
    for name, (graph, example) in _graphs(model).items():
        reads, gives = names[name]
        path = folder / f"{name}.onnx"
        with _without_what_concerns_nobody():
            program = torch.onnx.export(
                graph,
                (example,),
                input_names=[reads],
                output_names=[gives],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        with written_aside(path) as aside:
            program.save(aside)
        paths.append(path)
        report(path)
    return paths


@contextmanager
def _without_what_concerns_nobody() -> Iterator[None]:
    """Without two things that PyTorch's exporter says of itself: that it misses torchvision, which nothing here uses,
    and that it calls a function of its own which is deprecated."""

    def concerns(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed. Skipping torchvision::")

    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    log.addFilter(concerns)
    try:
        with warnings.catch_warnings():
            deprecated = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
            warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
            yield
    finally:
        log.removeFilter(concerns)


def _graphs(model: QLIPModel) -> dict[str, tuple[nn.Module, Tensor]]:
    """The two graphs and an example of each one's input, of two images: one would be taken for a constant."""
    channels, side = model.config.vision_config.num_channels, model.image_size
    pixels = torch.zeros(2, channels, side, side, dtype=model.dtype, device=model.device)
    indices = torch.zeros(2, model.grid[0] * model.grid[1], model.num_groups, dtype=torch.int64, device=model.device)
    return {"encode": (EncodeGraph(model).eval(), pixels), "decode": (DecodeGraph(model).eval(), indices)}
