"""Networks of features by name."""

from __future__ import annotations

from pathlib import Path

from qlip.errors import QLIPError
from qlip.evaluation.networks.base import FeatureNetwork
from qlip.evaluation.networks.inception import Inception
from qlip.evaluation.networks.lpips import LPIPS
from qlip.evaluation.networks.resnet50 import ResNet50
from qlip.evaluation.networks.vgg16 import VGG16Features
from qlip.registry import unknown_name

NETWORKS = (VGG16Features.name, ResNet50.name, Inception.name)
"""Names that :func:`load` accepts."""


def load(
    name: str = VGG16Features.name, weights: str | Path | None = None, convention: str | None = None
) -> FeatureNetwork:
    """A network with its published weights, on the CPU.

    Args:
        name: one of ``NETWORKS``.
        weights: of ``fid``, the published file; by default all come from the cache, see ``qlip data get``.
        convention: of ``fid``, how images come to it: ``tensorflow`` (default), ``pytorch-fid`` or ``clean-fid``.

    Raises:
        QLIPError: no such network, its weights are not there or are others, or a setting that it does not have.
    """
    if name not in NETWORKS:
        raise unknown_name(name, "feature network", NETWORKS)
    if name == Inception.name:
        made = convention or "tensorflow"
        if weights is not None:
            return Inception.from_file(weights, made)  # type: ignore[arg-type]  # checked there
        return Inception.from_cache(convention=made)  # type: ignore[arg-type]
    if weights is not None or convention is not None:
        raise QLIPError(f"{name}: its weights and input are what they are; only {Inception.name} takes others")
    if name == ResNet50.name:
        return ResNet50.from_cache()
    return VGG16Features(LPIPS.from_cache("vgg"))
