"""Inception's published file to safetensors: checksum, unpickling, remedies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlip.data.public import get, inception
from qlip.errors import QLIPError
from qlip.files import sha256_of


def published(path: Path) -> dict[str, torch.Tensor]:
    """A file of the published one's make."""
    tensors = {"Conv2d_1a_3x3.conv.weight": torch.randn(2, 3), "fc.weight": torch.randn(4, 2), "fc.bias": torch.ones(4)}
    torch.save({**tensors, "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}, path)
    return tensors


def test_build__only_from_a_file_of_the_right_checksum(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "archives" / inception.PAGE.rpartition("/")[2]
    tensors = published(path)
    with pytest.raises(QLIPError, match=r"SHA-256 is .*, that of FID's network is 6726825d0af5f729\.\.\.; with other"):
        inception.read_published(path)
    with pytest.raises(
        QLIPError, match=r"SHA-256 is .*, that of https://.* is 6726825d0af5f729\.\.\.; replace or remove it"
    ):
        get("inception", progress=False)
    monkeypatch.setattr(inception, "SHA256", sha256_of(path))
    get("inception", progress=False)
    back = inception.read_weights()
    assert back.keys() == {"Conv2d_1a_3x3.conv.weight"}
    assert torch.equal(back["Conv2d_1a_3x3.conv.weight"], tensors["Conv2d_1a_3x3.conv.weight"])


def test_sha256__is_the_one_in_the_file_name() -> None:
    assert inception.PAGE.endswith(f"-{inception.SHA256[:8]}.pth")


def test_build__without_a_network_says_the_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "fetch_page", lambda *given, quiet: None)
    with pytest.raises(QLIPError, match=r"put pt_inception-2015-12-05-6726825d\.pth into a folder and set QLIP_DATA_"):
        get("inception", progress=False)
    with pytest.raises(QLIPError, match=r"none.pth: No such file or directory; give pt_inception"):
        inception.read_published(Path("none.pth"))


def test_read_published__loads_nothing_that_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": print}, path)
    monkeypatch.setattr(inception, "SHA256", sha256_of(path))
    with pytest.raises(QLIPError, match=r"x.pth: cannot be read \(UnpicklingError\)"):
        inception.read_published(path)
