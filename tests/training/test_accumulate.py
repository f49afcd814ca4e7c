"""Micro-batches give the gradients of the whole batch: embeddings, entropies, sums, dropout and all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlip import QLIPModel, QLIPProcessor
from qlip.data.loader.batch import Batch
from qlip.modeling import QLIPConfig
from qlip.training.accumulate import backward
from qlip.training.recipe import check_recipe
from qlip.training.task import LossInputs
from qlip.training.tasks import Stage1
from qlip.training.tasks.recipe import Stage1Recipe

COUNT = 7


def recipe(checkpoint: Path, **losses: object) -> Stage1Recipe:
    values = {
        "name": "test",
        "model": {"init": str(checkpoint)},
        "data": {"sources": [{"path": "unused"}]},
        "batch_size": COUNT,
        "schedule": {"steps": 1},
        "losses": {"alpha_r": 10.0, "alpha_q": 2.0, "alpha_a": 1.5, "commitment": 0.3} | losses,
    }
    found = check_recipe(values, "test")
    assert isinstance(found, Stage1Recipe)
    return found


def make_task(checkpoint: Path, dropout: float = 0.0, **losses: object) -> Stage1:
    values = QLIPModel.from_pretrained(checkpoint).config.to_dict()
    for tower in ("vision_config", "text_config", "decoder_config"):
        values[tower]["attention_dropout"] = dropout
    torch.manual_seed(0)
    model = QLIPModel(QLIPConfig.from_dict(values))
    model.load_state_dict(QLIPModel.from_pretrained(checkpoint).state_dict())
    return Stage1(model.train(), QLIPProcessor.from_pretrained(checkpoint), recipe(checkpoint, **losses))


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(0, 500, (COUNT, 16), generator=generator)
    return Batch(
        pixel_values=torch.randn(COUNT, 3, 32, 32, generator=generator),
        input_ids=input_ids,
        has_caption=torch.tensor([True, True, False, True, True, True, False]),
        match_ids=torch.tensor([1, 2, 0, 1, 3, 4, 0]),
        keys=[str(number) for number in range(COUNT)],
        captions=[None] * COUNT,
    )


def part_of(batch: Batch, start: int, stop: int) -> Batch:
    tensors = {
        name: getattr(batch, name)[start:stop] for name in ("pixel_values", "input_ids", "has_caption", "match_ids")
    }
    return replace(batch, **tensors, keys=batch.keys[start:stop], captions=batch.captions[start:stop])


def cut(batch: Batch, *bounds: int) -> list[Batch]:
    edges = [0, *bounds, COUNT]
    return [part_of(batch, start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: one.grad.clone() for name, one in network.named_parameters() if one.grad is not None}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        torch.testing.assert_close(actual[name], one, rtol=2e-4, atol=2e-6 * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bounds", [(3,), (1, 2, 5), (2, 3, 3, 6)], ids=["two", "four", "one empty, one without words"])
@pytest.mark.parametrize("estimator", ["group", "bit"])
def test_micro_batches_equal_the_whole_batch(checkpoint: Path, bounds: tuple[int, ...], estimator: str) -> None:
    options = {"entropy": {"estimator": estimator, "codebook": 1.7}}
    whole, pieces = make_task(checkpoint, **options), make_task(checkpoint, **options)
    expected = backward(whole.phases[0], [make_batch()])
    actual = backward(pieces.phases[0], cut(make_batch(), *bounds))
    assert_equal(gradients_of(pieces.model), gradients_of(whole.model))
    assert actual.losses.keys() == expected.losses.keys() == {"mse", "bsq", "commitment", "align"}
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.report, expected.report, rtol=1e-5, atol=1e-6)
    for name, buffer in whole.usage.named_buffers():
        torch.testing.assert_close(pieces.usage.get_buffer(name), buffer)  # each image is counted once


def test_siglip(checkpoint: Path) -> None:
    options = {"align": {"kind": "siglip", "bias": -2.0, "chunk_size": 2}}
    whole, pieces = make_task(checkpoint, **options), make_task(checkpoint, **options)
    backward(whole.phases[0], [make_batch()])
    backward(pieces.phases[0], cut(make_batch(), 2, 4))
    for name in ("model", "extra"):
        found = gradients_of(whole.networks[name])
        assert found
        assert_equal(gradients_of(pieces.networks[name]), found)


def test_dropout_is_replayed(checkpoint: Path) -> None:
    """The twin keeps the graph of all micro-batches at once, drawn in the same order."""
    whole, pieces = make_task(checkpoint, dropout=0.3), make_task(checkpoint, dropout=0.3)
    micro = cut(make_batch(), 2, 5)
    phase = whole.phases[0]
    torch.manual_seed(11)
    total: list[LossInputs] = []
    states = []
    for batch in micro:
        states.append(torch.get_rng_state())
        with torch.no_grad():
            phase.forward(batch, True)  # what the first pass draws moves the state for the next micro-batch
    for batch, state in zip(micro, states, strict=True):
        torch.set_rng_state(state)
        total.append(phase.forward(batch, False))
    losses, _ = phase.loss(joined(total))
    torch.stack(list(losses.values())).sum().backward()
    torch.manual_seed(11)
    backward(pieces.phases[0], micro)
    assert_equal(gradients_of(pieces.model), gradients_of(whole.model))
    plain = make_task(checkpoint)
    backward(plain.phases[0], micro)
    name = "vision_decoder.conv_out.weight"
    assert not torch.allclose(gradients_of(plain.model)[name], gradients_of(whole.model)[name])


def joined(pieces: list[LossInputs]) -> LossInputs:
    total = LossInputs()
    for kind in ("embeddings", "metadata"):
        for name in getattr(pieces[0], kind):
            getattr(total, kind)[name] = torch.cat([getattr(piece, kind)[name] for piece in pieces])
    for kind in ("mean_stats", "sums", "counts"):
        for name in getattr(pieces[0], kind):
            getattr(total, kind)[name] = sum(getattr(piece, kind)[name] for piece in pieces)
    return total


def test_mean_accumulation_averages_losses_of_their_own(checkpoint: Path) -> None:
    task, twin = make_task(checkpoint), make_task(checkpoint)
    micro = cut(make_batch(), 4)
    result = backward(task.phases[0], micro, exact=False)
    for batch in micro:
        losses, _ = twin.phases[0].loss(twin.phases[0].forward(batch, False))
        (torch.stack(list(losses.values())).sum() / 2).backward()
    assert_equal(gradients_of(task.model), gradients_of(twin.model))
    exact = make_task(checkpoint)
    assert not torch.isclose(backward(exact.phases[0], micro).losses["align"], result.losses["align"], rtol=1e-3)


@pytest.mark.parametrize(
    ("losses", "still"),
    [
        ({"alpha_a": 0.0}, ["text_model", "text_projection", "visual_projection", "logit_scale"]),
        ({"alpha_r": 0.0}, ["vision_decoder", "vision_model.quant_embed_post"]),
    ],
)
def test_a_term_of_weight_0_trains_nothing_of_its_own(checkpoint: Path, losses: dict, still: list[str]) -> None:
    task = make_task(checkpoint, **losses)
    result = backward(task.phases[0], cut(make_batch(), 3))
    moved = gradients_of(task.model)
    assert not [name for name in moved if name.startswith(tuple(still))]
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in moved
    assert ("align" in result.losses, "mse" in result.losses) == ("alpha_a" not in losses, "alpha_r" not in losses)


def test_what_is_inspected_still_has_its_graph(checkpoint: Path) -> None:
    for micro in ([make_batch()], cut(make_batch(), 3)):
        task = make_task(checkpoint)

        def norms(losses: dict[str, Tensor], task: Stage1 = task) -> dict[str, Tensor]:
            found = {}
            for name, loss in losses.items():
                (gradient,) = torch.autograd.grad(loss, task.shared_layer, retain_graph=True)
                found[f"norm/{name}"] = gradient.norm()
            return found

        result = backward(task.phases[0], micro, inspect=norms)
        assert result.report["norm/align"] > 0
        assert result.report["norm/mse"] > 0
