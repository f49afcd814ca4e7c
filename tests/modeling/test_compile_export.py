"""The model under torch.compile, autocast, torch.export and ONNX."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from qlip import QLIPConfig, QLIPError, QLIPModel
from qlip.modeling.export import export_graphs, export_onnx
from tests.modeling.helpers import small_config


@pytest.fixture
def model() -> QLIPModel:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = QLIPModel(QLIPConfig.from_dict(small_config(towers__num_hidden_layers=1))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.12)
    return model


def _batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 3, 16, 16), torch.randint(3, 50, (2, 10))) for _ in range(count)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_forward_is_one_graph_and_compiles_once(model: QLIPModel, training: bool) -> None:
    model.train(training)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for pixels, ids in _batches(3):
        output, expected = compiled(pixels, ids, return_loss=True), model(pixels, ids, return_loss=True)
        assert torch.equal(output.indices, expected.indices)
        torch.testing.assert_close(output.reconstructions, expected.reconstructions)
        torch.testing.assert_close(output.loss, expected.loss)
        if training:
            torch.testing.assert_close(output.quantizer_loss, expected.quantizer_loss)
    assert counter.frame_count == 1


def test_encode_and_decode_are_one_graph_and_compile_once(model: QLIPModel) -> None:
    counter = CompileCounter()
    encode = torch.compile(model.encode, backend=counter, fullgraph=True)
    for pixels, _ in _batches(3):
        assert torch.equal(encode(pixels), model.encode(pixels))
    assert counter.frame_count == 1
    decode = torch.compile(model.decode, backend=counter, fullgraph=True)
    for _ in range(3):
        indices = torch.randint(0, 16, (2, 16, 3))
        torch.testing.assert_close(decode(indices), model.decode(indices))
    assert counter.frame_count == 2


def test_a_compiled_training_step_has_the_eager_gradients(model: QLIPModel) -> None:
    """Through the ahead-of-time autograd, which the compiler proper uses."""
    model.train()
    (pixels, ids), *_ = _batches(1)
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        output = run(pixels, ids, return_loss=True)
        (output.reconstructions.square().mean() + output.loss + output.quantizer_loss).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_default_backend_agrees(model: QLIPModel) -> None:
    """Needs a C++ compiler."""
    compiled = torch.compile(model, fullgraph=True)
    encode = torch.compile(model.encode, fullgraph=True)
    for pixels, ids in _batches(2):
        expected = model(pixels, ids)
        assert torch.equal(encode(pixels), expected.indices)
        torch.testing.assert_close(
            compiled(pixels, ids).reconstructions, expected.reconstructions, rtol=1e-4, atol=1e-5
        )


# --- autocast ------------------------------------------------------------------------------------------------


def test_autocast_keeps_losses_in_float32_and_gradients_finite(model: QLIPModel) -> None:
    model.train()
    pixels, ids = _batches(1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels, ids, return_loss=True)
    for name in ("loss", "quantizer_loss", "persample_entropy", "codebook_entropy", "commitment"):
        value = getattr(output, name)
        assert value.dtype == torch.float32, name
        assert torch.isfinite(value), name
    (output.reconstructions.float().square().mean() + output.loss + output.quantizer_loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_autocast_normalises_latents_in_float32(model: QLIPModel) -> None:
    patches = torch.randn(2, 5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = model.vision_model.quant_embed(patches)
        latents = model.vision_model.latents(patches)
    assert raw.dtype == torch.bfloat16
    expected = raw.double() / raw.double().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(latents.double(), expected.to(latents.dtype).double(), rtol=0, atol=1e-6)


def test_autocast_keeps_embeddings_and_similarities_in_float32(model: QLIPModel) -> None:
    pixels, ids = _batches(1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels, ids)
    for name in ("image_embeds", "text_embeds"):
        norms = getattr(output, name).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones(2), rtol=0, atol=1e-6)
    expected = output.text_embeds @ output.image_embeds.t() * model.logit_scale.exp()
    torch.testing.assert_close(output.logits_per_text, expected, rtol=1e-6, atol=1e-5)


# --- export --------------------------------------------------------------------------------------------------


def test_export_for_any_number_of_pictures(model: QLIPModel) -> None:
    programs = {name: program.module() for name, program in export_graphs(model).items()}
    for count in (1, 2, 7):
        pixels = torch.randn(count, 3, 16, 16)
        indices = model.encode(pixels)
        assert torch.equal(programs["encode"](pixels), indices)
        torch.testing.assert_close(programs["decode"](indices), model.decode(indices), rtol=1e-5, atol=1e-5)


def test_onnx_agrees_by_onnxruntime(
    model: QLIPModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """And is written without what PyTorch's exporter remarks on itself; all else that it says is heard."""
    onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "qlip[export]"')
    pytest.importorskip("onnxscript", reason='needs pip install "qlip[export]"')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    log.addHandler(caplog.handler)
    paths = export_onnx(model, tmp_path / "onnx", lambda path: log.warning(path.name))
    log.warning("torchvision is not installed. Skipping torchvision::nms")  # after it, that too
    log.removeHandler(caplog.handler)
    heard = dict.fromkeys(record.getMessage().split()[0] for record in caplog.records if record.name == log.name)
    assert list(heard) == ["encode.onnx", "decode.onnx", "torchvision"]
    assert not [one for one in recwarn if "LeafSpec" in str(one.message)]
    encode, decode = (
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for path in paths
    )
    for count in (2, 1, 5):
        pixels = torch.randn(count, 3, 16, 16)
        indices = model.encode(pixels)
        (ours,) = encode.run(["indices"], {"pixel_values": pixels.numpy()})
        assert torch.equal(torch.from_numpy(ours), indices)
        (rebuilt,) = decode.run(["pixel_values"], {"indices": indices.numpy()})
        torch.testing.assert_close(torch.from_numpy(rebuilt), model.decode(indices), rtol=1e-4, atol=1e-4)


def test_onnx_is_refused_in_half_precision(model: QLIPModel, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason='needs pip install "qlip[export]"')
    with pytest.raises(QLIPError, match="needs float32 weights"):
        export_onnx(copy.deepcopy(model).half(), tmp_path)
