"""Graphs of the model: torch.export and ONNX."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch

from qlip import QLIPConfig, QLIPError, QLIPModel
from qlip.modeling.export import DecodeGraph, EncodeGraph, _silence_exporter_warnings, export_onnx
from tests.modeling.helpers import small_config


@pytest.fixture
def model() -> QLIPModel:
    torch.manual_seed(0)
    model = QLIPModel(QLIPConfig.from_dict(small_config(towers__num_hidden_layers=1))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.12)
    return model


def test_graphs__torch_export_with_any_batch_size(model: QLIPModel) -> None:
    batch = torch.export.Dim("batch")
    examples = (EncodeGraph(model), torch.zeros(2, 3, 16, 16)), (DecodeGraph(model), torch.zeros(2, 16, 3).long())
    encode, decode = (
        torch.export.export(graph.eval(), (example,), dynamic_shapes=({0: batch},)).module()
        for graph, example in examples
    )
    for count in (1, 2, 7):
        pixels = torch.randn(count, 3, 16, 16)
        indices = model.encode(pixels)
        assert torch.equal(encode(pixels), indices)
        torch.testing.assert_close(decode(indices), model.decode(indices), rtol=1e-5, atol=1e-5)


def test_onnx__agrees_with_the_model(
    model: QLIPModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript", reason='needs pip install "qlip[export]"')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    paths = export_onnx(model, tmp_path / "onnx")
    assert [path.name for path in paths] == ["decode.onnx", "encode.onnx"]
    assert not [record for record in caplog.records if "torchvision" in record.getMessage()]
    assert not [one for one in recwarn if "LeafSpec" in str(one.message)]
    decode, encode = (
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for path in paths
    )
    for count in (2, 1, 5):
        pixels = torch.randn(count, 3, 16, 16)
        indices = model.encode(pixels)
        (ours,) = encode.run(["indices"], {"pixel_values": pixels.numpy()})
        assert torch.equal(torch.from_numpy(ours), indices)
        (rebuilt,) = decode.run(["pixel_values"], {"indices": indices.numpy()})
        torch.testing.assert_close(torch.from_numpy(rebuilt), model.decode(indices), rtol=1e-4, atol=1e-4)


def test_onnx__large_weights_lie_beside_the_graph(
    model: QLIPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    program = pytest.importorskip("torch.onnx._internal.exporter._onnx_program")
    monkeypatch.setattr(program, "_LARGE_MODEL_THRESHOLD", 1000)  # bytes, as if one file held no more
    paths = export_onnx(model, tmp_path / "onnx")
    assert [path.name for path in paths] == ["decode.onnx", "decode.onnx.data", "encode.onnx", "encode.onnx.data"]
    assert sorted((tmp_path / "onnx").iterdir()) == paths
    moved = (tmp_path / "onnx").rename(tmp_path / "elsewhere")
    encode = onnxruntime.InferenceSession(str(moved / "encode.onnx"), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(torch.from_numpy(encode.run(None, {"pixel_values": pixels.numpy()})[0]), model.encode(pixels))


def test_onnx__half_precision_is_refused(model: QLIPModel, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason='needs pip install "qlip[export]"')
    with pytest.raises(QLIPError, match="needs float32 weights"):
        export_onnx(copy.deepcopy(model).half(), tmp_path)


def test_silence_exporter_warnings__other_messages_pass(caplog: pytest.LogCaptureFixture) -> None:
    log, harmless = logging.getLogger("torch.onnx._internal.exporter._registration"), "torchvision is not installed."
    log.addHandler(caplog.handler)
    with _silence_exporter_warnings():
        log.warning(f"{harmless} Skipping torchvision::nms")
        log.warning("another message")
    log.warning(f"{harmless} Skipping torchvision::roi_align")
    log.removeHandler(caplog.handler)
    heard = [record.getMessage() for record in caplog.records if record.name == log.name]
    assert list(dict.fromkeys(heard)) == ["another message", f"{harmless} Skipping torchvision::roi_align"]
