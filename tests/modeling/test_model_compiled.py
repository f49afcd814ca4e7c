"""The model under torch.compile and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from qlip import QLIPConfig, QLIPModel
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
def test_forward__is_one_graph_and_compiles_once(model: QLIPModel, training: bool) -> None:
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


def test_encode_and_decode__are_one_graph_and_compile_once(model: QLIPModel) -> None:
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


def test_training_step__compiled_gradients_equal_eager(model: QLIPModel) -> None:
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
def test_forward__default_backend_agrees(model: QLIPModel) -> None:
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


def test_autocast__losses_float32_and_gradients_finite(model: QLIPModel) -> None:
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


def test_autocast__latents_normalised_in_float32(model: QLIPModel) -> None:
    patches = torch.randn(2, 5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = model.vision_model.quant_embed(patches)
        latents = model.vision_model.latents(patches)
    assert raw.dtype == torch.bfloat16
    expected = raw.double() / raw.double().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(latents.double(), expected.to(latents.dtype).double(), rtol=0, atol=1e-6)


def test_autocast__embeddings_and_similarities_float32(model: QLIPModel) -> None:
    pixels, ids = _batches(1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels, ids)
    for name in ("image_embeds", "text_embeds"):
        norms = getattr(output, name).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones(2), rtol=0, atol=1e-6)
    expected = output.text_embeds @ output.image_embeds.t() * model.logit_scale.exp()
    torch.testing.assert_close(output.logits_per_text, expected, rtol=1e-6, atol=1e-5)
