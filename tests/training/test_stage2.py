"""Stage 2 on a tiny model: what trains and what must not move, two players, micro-batches, export."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlip import QLIPModel, QLIPProcessor, assets
from qlip.data.loader.batch import Batch
from qlip.errors import QLIPError
from qlip.evaluation.networks.lpips import LPIPS
from qlip.modeling import load_image
from qlip.training.accumulate import backward
from qlip.training.optim.clipping import clip_gradients
from qlip.training.optim.ema import EMA
from qlip.training.optim.optimizers import load_named_state, named_state
from qlip.training.recipe import check_recipe
from qlip.training.tasks import Stage2
from qlip.training.tasks.recipe import Stage2Recipe
from qlip.training.tasks.stage2_checkpoint import PREPROCESSING, load_without_text

GAN: dict[str, Any] = {"channels": 8, "layers": 2, "lr": 1e-3}
CODES = ("vision_model.quant_embed.",)
TRAINED = (*CODES, "vision_model.quant_embed_post.", "vision_decoder.")


def recipe(checkpoint: Path, gan: dict[str, Any] | None = None, losses: dict[str, Any] | None = None, **more: Any):
    values = {
        "name": "test",
        "stage": 2,
        "model": {"init": str(checkpoint)},
        "data": {"sources": [{"path": "unused"}]},
        "batch_size": 8,
        "schedule": {"steps": 1},
        "losses": {"alpha_g": 0.1 if gan is not None else 0.0, "alpha_p": 0.0} | (losses or {}),
        "discriminator": None if gan is None else GAN | gan,
        "optimizer": {"lr": 5e-4, "parts": {"decoder": 1e-4}},
    } | more
    found = check_recipe(values, "test")
    assert isinstance(found, Stage2Recipe)
    return found


def make(
    checkpoint: Path, gan: dict[str, Any] | None = None, perceptual: LPIPS | None = None, fresh: Any = (), **more: Any
) -> Stage2:
    settings = recipe(checkpoint, gan, **more)
    return Stage2(
        load_without_text(checkpoint, fresh), QLIPProcessor.from_pretrained(checkpoint), settings, perceptual=perceptual
    )


@pytest.fixture(scope="module")
def perceptual() -> LPIPS:
    """Random weights serve where only gradients are compared, and need no network."""
    torch.manual_seed(7)
    network = LPIPS("alex")
    for convolution in network.features:
        convolution.weight.data.mul_(2)  # as trained ones keep the signal
    return network


@pytest.fixture(scope="module")
def batch(checkpoint: Path) -> Batch:
    """Eight crops of the package's photographs."""
    processor = QLIPProcessor.from_pretrained(checkpoint)
    images = [load_image(path).resize((96, 96)) for path in sorted(assets.path("images").glob("*.jpg"))][:8]
    crops = [image.crop((20 + 3 * n, 30, 52 + 3 * n, 62)) for n, image in enumerate(images)]
    pixels = torch.stack([processor.pixels(crop) for crop in crops]).reshape(8, 3, 32, 32)
    return batch_of(pixels)


def batch_of(pixels: Tensor) -> Batch:
    count = len(pixels)
    return Batch(
        pixel_values=pixels,
        input_ids=torch.zeros(count, 1, dtype=torch.int64),
        has_caption=torch.zeros(count, dtype=torch.bool),
        match_ids=torch.zeros(count, dtype=torch.int64),
        keys=[str(number) for number in range(count)],
        captions=[None] * count,
    )


def cut(batch: Batch, *sizes: int) -> list[Batch]:
    assert sum(sizes) == len(batch)
    return [batch_of(pixels) for pixels in batch.pixel_values.split(list(sizes))]


def step(task: Stage2, number: int, batches: list[Batch]) -> dict[str, float]:
    """As a trainer takes it."""
    values: dict[str, float] = {}
    task.before_step(number)
    for phase in task.phases:
        if not phase.active(number):
            continue
        result = backward(phase, batches)
        clip_gradients(phase.parameters, phase.clip)
        for optimizer in phase.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        values |= {name: float(value) for name, value in (result.report | {f"loss/{phase.name}": result.total}).items()}
    task.after_step()
    return values


def state_of(task: Stage2) -> dict[str, Tensor]:
    return {f"{net}/{name}": t.clone() for net, m in task.networks.items() for name, t in m.state_dict().items()}


# what is there


def test_the_text_side_is_neither_loaded_nor_allocated(checkpoint: Path) -> None:
    whole = QLIPModel.from_pretrained(checkpoint)
    text = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith("text_")}
    tables = {tuple(t.shape) for t in text.values() if t.ndim == 2 and t.numel() >= 1000}
    vision = sum(t.numel() for name, t in whole.state_dict().items() if name not in text)
    del whole, text
    gc.collect()
    before = {id(one) for one in gc.get_objects() if issubclass(type(one), Tensor)}
    task = make(checkpoint)
    created = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and id(one) not in before]
    embedding = next(shape for shape in tables if shape[0] > 500)
    assert not [one for one in created if tuple(one.shape) == embedding and one.device.type != "meta"]
    assert not [name for name in task.model.state_dict() if name.startswith("text_")]
    assert sum(t.numel() for t in task.model.state_dict().values()) == vision
    # one that was loaded with the model goes, too
    model = QLIPModel.from_pretrained(checkpoint)
    late = Stage2(model, QLIPProcessor.from_pretrained(checkpoint), recipe(checkpoint))
    assert late.model is model and not [name for name in model.state_dict() if name.startswith("text_")]


def test_bottleneck_and_decoder_train_at_their_rates(checkpoint: Path, perceptual: LPIPS) -> None:
    task = make(checkpoint, gan={}, perceptual=perceptual, losses={"alpha_p": 0.1})
    trained = {name for name, one in task.model.named_parameters() if one.requires_grad}
    assert trained == {name for name in task.model.state_dict() if name.startswith(TRAINED)}
    rates = {
        name: group["initial_lr"]
        for phase in task.phases
        for optimizer in phase.optimizers
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert rates["vision_model.quant_embed.c_fc.weight"] == rates["vision_model.quant_embed_post.c_proj.bias"] == 5e-4
    assert rates["vision_decoder.conv_out.weight"] == 1e-4 and rates["layers.0.weight"] == 1e-3
    assert [phase.name for phase in task.phases] == ["model", "discriminator"]
    assert task.shared_layer is task.model.vision_decoder.conv_out.weight
    assert (
        task.sizes["lpips"] == sum(one.numel() for one in perceptual.parameters())
        and task.sizes["discriminator"] > 1000
    )
    assert set(task.networks) == {"model", "usage", "discriminator"}


def test_the_encoder_keeps_no_activation(checkpoint: Path, batch: Batch) -> None:
    task = make(checkpoint)
    encoder = task.model.vision_model.encoder
    kept: list[bool] = []
    inside = False

    def enter(*_: object) -> None:
        nonlocal inside
        inside = True

    def leave(*_: object) -> None:
        nonlocal inside
        inside = False

    hooks = [task.model.vision_model.embeddings.register_forward_pre_hook(enter), encoder.register_forward_hook(leave)]

    def pack(tensor: Tensor) -> Tensor:
        kept.append(inside)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task.forward(batch, False)
    for hook in hooks:
        hook.remove()
    assert kept and not any(kept)
    assert not encoder.training and not task.model.vision_model.embeddings.training
    assert task.model.vision_decoder.encoder.training


# steps


def test_losses_fall_and_what_is_frozen_stays_bit_by_bit(checkpoint: Path, batch: Batch, perceptual: LPIPS) -> None:
    task = make(
        checkpoint, gan={"lecam": 0.01, "r1": 0.1, "r1_every": 3}, perceptual=perceptual,
        losses={"alpha_p": 0.1, "alpha_g": 1e-3, "commitment": 0.1}, optimizer={"lr": 3e-3},
    )  # fmt: skip
    before = state_of(task)
    found = [step(task, number, [batch]) for number in range(20)]
    assert found[-1]["mse"] < 0.7 * found[0]["mse"] and found[-1]["loss/model"] < found[0]["loss/model"]
    assert found[-1]["lpips"] < found[0]["lpips"]
    assert found[-1]["logits_real"] > found[-1]["logits_fake"], "the discriminator learns, too"
    assert ["r1" in values for values in found[:5]] == [True, False, False, True, False]
    assert found[0]["lecam"] == 0.0 and found[1]["lecam"] > 0.0
    after = state_of(task)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith("model/") and not name.startswith(_under("model", TRAINED))}
    assert len(frozen) > 20 and not moved & frozen
    assert all(name in moved for name in before if name.startswith(("discriminator/", "lecam/")))
    assert all(name in moved for name in before if name.startswith(_under("model", TRAINED)))
    assert int(task.usage.tokens) == 20 * 8 * 16 and task.summary()


def _under(network: str, prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{network}/{prefix}" for prefix in prefixes)


def test_frozen_codes_stay_valid(checkpoint: Path, batch: Batch) -> None:
    task = make(checkpoint, losses={"alpha_q": 0.0, "freeze_codes": True})
    codes, fingerprint = task.model.encode(batch.pixel_values), task.model.code_fingerprint
    before = state_of(task)
    found = [step(task, number, [batch]) for number in range(3)]
    after = state_of(task)
    assert torch.equal(task.model.encode(batch.pixel_values), codes) and task.model.code_fingerprint == fingerprint
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(_under("model", CODES)))
    assert found[-1]["mse"] < found[0]["mse"] and "bsq" not in found[0]
    moving = make(checkpoint)
    for number in range(3):
        step(moving, number, [batch])
    assert moving.model.code_fingerprint != fingerprint


def test_the_discriminator_starts_late_and_the_generators_term_rises(checkpoint: Path, batch: Batch) -> None:
    task = make(checkpoint, gan={"start": 2, "warmup": 2})
    assert task.second is not None
    before = state_of(task)
    weights = []
    for number in range(5):
        values = step(task, number, [batch])
        weights.append(values.get("gan_weight"))
        assert ("discriminator" in values) == (number >= 2)
        untouched = all(torch.equal(before[n], t) for n, t in state_of(task).items() if n.startswith("discriminator/"))
        assert untouched == (number < 2)
    assert weights == [None, None, None, pytest.approx(0.05), pytest.approx(0.1)]


def test_the_generators_term_is_alpha_times_the_loss_and_spares_the_discriminator(
    checkpoint: Path, batch: Batch
) -> None:
    """Against a plain graph through the discriminator."""
    task = make(checkpoint, gan={}, losses={"alpha_r": 0.0, "alpha_q": 0.0, "alpha_g": 0.3})
    assert task.second is not None
    task.before_step(0)
    backward(task.phases[0], [batch])
    found = {name: one.grad for name, one in task.model.named_parameters() if one.grad is not None}
    assert all(one.grad is None for one in task.second.network.parameters())
    plain = copy.deepcopy(task.model).train()
    rebuilt = plain(pixel_values=batch.pixel_values).reconstructions
    (-0.3 * task.second.network(task.signed(rebuilt)).mean()).backward()
    for name, one in plain.named_parameters():
        if one.requires_grad:
            assert one.grad is not None
            torch.testing.assert_close(found[name], one.grad, rtol=1e-4, atol=1e-8)


def test_lpips__on_pixels_in_its_own_range(checkpoint: Path) -> None:
    task = make(checkpoint)
    preprocessing = task.processor.preprocessing
    unit = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(task.signed(preprocessing.normalize(unit)), 2 * unit - 1)
    far = torch.full((1, 3, 8, 8), 40.0, requires_grad=True)
    task.signed(far).sum().backward()
    assert far.grad is not None and bool((far.grad > 0).all()), "a pixel out of range is pulled back"


def test_the_adaptive_weight_makes_gradients_equal_at_the_last_layer(
    checkpoint: Path, batch: Batch, perceptual: LPIPS
) -> None:
    task = make(checkpoint, gan={"adaptive": True}, perceptual=perceptual, losses={"alpha_p": 0.1, "alpha_g": 1.0})
    task.before_step(0)
    losses, report = task.loss(task.forward(batch, False))
    lengths = {
        name: torch.autograd.grad(term, task.shared_layer, retain_graph=True)[0].norm()
        for name, term in {"fidelity": losses["mse"] + losses["lpips"], "gan": losses["gan"]}.items()
    }
    torch.testing.assert_close(lengths["gan"], lengths["fidelity"], rtol=1e-3, atol=0)
    assert float(report["gan_weight"]) > 0
    with pytest.raises(
        QLIPError, match="discriminator.adaptive needs a whole batch at once; set micro_batch_size=null"
    ):
        make(checkpoint, gan={"adaptive": True}, micro_batch_size=4)


# micro-batches


@pytest.mark.parametrize(
    ("gan", "sizes"),
    [({"r1": 0.5, "lecam": 0.1}, (3, 0, 5)), ({"kind": "stylegan", "layers": 3, "loss": "non_saturating"}, (4, 4))],
)
def test_micro_batches_are_one_batch_for_both_players(
    checkpoint: Path, batch: Batch, perceptual: LPIPS, gan: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    losses = {"alpha_p": 0.3, "alpha_g": 0.2, "alpha_q": 2.0, "commitment": 0.3}
    tasks = [make(checkpoint, gan=gan, perceptual=perceptual, losses=losses) for _ in range(2)]
    for task in tasks:  # means that LeCAM pulls to
        assert task.second is not None
        task.second.running.update(torch.tensor(0.4), torch.tensor(-0.3))
        task.before_step(0)
    cuts = [[batch], cut(batch, *sizes)]
    for whole, pieces in zip(tasks[0].phases, tasks[1].phases, strict=True):
        first, second = backward(whole, cuts[0]), backward(pieces, cuts[1])
        torch.testing.assert_close(second.losses, first.losses, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(second.report, first.report, rtol=1e-4, atol=1e-6)
        for one, other in zip(whole.parameters, pieces.parameters, strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-6 + 1e-4 * float(one.grad.abs().max()))
    for task in tasks:
        task.after_step()
    assert tasks[0].second is not None and tasks[1].second is not None
    torch.testing.assert_close(tasks[1].second.running.state_dict(), tasks[0].second.running.state_dict())


def test_bfloat16_is_an_approximation_of_float32_for_both_players(
    checkpoint: Path, batch: Batch, perceptual: LPIPS
) -> None:
    found: list[Tensor] = []
    few = cut(batch, 2, 6)[0]  # products of bfloat16 are slow on a CPU
    small = {"channels": 4, "layers": 1, "r1": 0.5, "lecam": 0.1}
    for enabled in (False, True):
        task = make(checkpoint, gan=small, perceptual=perceptual, losses={"alpha_p": 0.3})
        task.before_step(0)
        for phase in task.phases:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                inputs = phase.forward(few, False)
            assert all(value.dtype == torch.float32 for value in (*inputs.sums.values(), *inputs.mean_stats.values()))
            losses, _ = phase.loss(inputs)
            torch.stack(list(losses.values())).sum().backward()
            gradients = [one.grad for one in phase.parameters if one.grad is not None]
            assert len(gradients) == len(phase.parameters)
            found.append(torch.cat([one.flatten() for one in gradients]))
    for exact, rough in zip(found[:2], found[2:], strict=True):
        assert float(torch.cosine_similarity(exact, rough, dim=0)) > 0.98


def test_stage2__rank_without_images_adds_nothing(checkpoint: Path, batch: Batch, perceptual: LPIPS) -> None:
    task = make(checkpoint, gan={"r1": 0.5, "lecam": 0.1}, perceptual=perceptual, losses={"alpha_p": 0.1})
    task.before_step(0)
    (empty,) = cut(batch, 8, 0)[1:]
    for phase in task.phases:
        for cached_only in (True, False):
            inputs = phase.forward(empty, cached_only)
            assert set(inputs.counts.values()) == {0}
            assert all(
                float(value.detach().abs().sum()) == 0.0
                for value in (*inputs.sums.values(), *inputs.mean_stats.values())
            )
        torch.stack(list(phase.forward(empty, False).sums.values())).sum().backward()
        assert all(one.grad is None or float(one.grad.abs().sum()) == 0.0 for one in phase.parameters)
    assert float(task.usage.tokens) == 0.0


# saved, resumed, exported


def test_both_optimizers_and_all_state_resume_exactly(checkpoint: Path, batch: Batch) -> None:
    gan = {"lecam": 0.1, "r1": 0.1, "r1_every": 2, "start": 1}
    straight = make(checkpoint, gan=gan)
    for number in range(3):
        step(straight, number, [batch])
    saved = state_of(straight)
    optimizers = [
        {name: value.clone() for name, value in named_state(optimizer).items()}
        for phase in straight.phases
        for optimizer in phase.optimizers
    ]
    expected = [step(straight, number, [batch]) for number in range(3, 6)]

    resumed = make(checkpoint, gan=gan)
    for network, module in resumed.networks.items():
        module.load_state_dict(
            {n.removeprefix(f"{network}/"): t for n, t in saved.items() if n.startswith(f"{network}/")}
        )
    theirs = [optimizer for phase in resumed.phases for optimizer in phase.optimizers]
    for optimizer, stored in zip(theirs, optimizers, strict=True):
        load_named_state(optimizer, stored)
    assert [step(resumed, number, [batch]) for number in range(3, 6)] == expected
    first, second = state_of(straight), state_of(resumed)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage2, EMA, Path]:
    task = make(checkpoint, gan={}, optimizer={"lr": 1e-2})
    ema = EMA(task.model, 0.5)
    for number in range(3):
        step(task, number, [batch])
        ema.update()
    folder = tmp_path_factory.mktemp("run") / "model"
    task.export(folder, ema.weights())
    return task, ema, folder


def test_an_export_embeds_as_stage_1_bit_by_bit(
    checkpoint: Path, batch: Batch, exported: tuple[Stage2, EMA, Path]
) -> None:
    task, ema, folder = exported
    first, second = QLIPModel.from_pretrained(checkpoint), QLIPModel.from_pretrained(folder)
    words = QLIPProcessor.from_pretrained(folder)(text=["a photo of a cat", "a rocket"])
    pixels = batch.pixel_values
    with torch.no_grad():
        one, other = (model(pixel_values=pixels, input_ids=words["input_ids"]) for model in (first, second))
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert not torch.allclose(one.reconstructions, other.reconstructions, atol=1e-3)
    with ema.applied():
        rebuilt = task.reconstruct(pixels)[1]
    torch.testing.assert_close(rebuilt, task.processor.preprocessing.denormalize(other.reconstructions))
    assert task.model.vision_decoder.training and not task.model.vision_model.encoder.training


def test_an_export_has_the_preprocessing_file_by_file(checkpoint: Path, exported: tuple[Stage2, EMA, Path]) -> None:
    _, _, folder = exported
    names = sorted(path.name for path in checkpoint.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    assert set(names) - {"config.json", "model.safetensors"} <= set(PREPROCESSING)
    for name in names:
        if name != "model.safetensors":
            assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()


def test_another_stage_1_in_the_same_place_is_noticed(
    checkpoint: Path, tmp_path: Path, exported: tuple[Stage2, EMA, Path]
) -> None:
    model = QLIPModel.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "stage1")
    QLIPProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "stage1")
    task = make(tmp_path / "stage1")
    weights = task.model.state_dict()
    with torch.no_grad():
        model.vision_model.post_layernorm.bias += 1
    model.save_pretrained(tmp_path / "stage1")
    with pytest.raises(QLIPError, match="'vision_model.post_layernorm.bias' is not what stage 2 started from; put"):
        task.export(tmp_path / "model", weights)


def test_a_checkpoint_without_its_text_side_is_refused_at_once(checkpoint: Path, tmp_path: Path) -> None:
    model = QLIPModel.from_pretrained(checkpoint)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "text_projection.weight"}
    model.save_pretrained(tmp_path, state=state)
    with pytest.raises(QLIPError, match="tensor 'text_projection.weight' is missing"):
        load_without_text(tmp_path)


def test_fresh_parts_are_random_and_the_rest_is_stage_1s(checkpoint: Path, tmp_path: Path) -> None:
    trained = load_without_text(checkpoint).state_dict()
    for fresh, prefixes in ((["decoder"], TRAINED[2:]), (["bottleneck"], TRAINED[:2])):
        task = make(checkpoint, model={"init": str(checkpoint), "fresh": fresh}, fresh=fresh)
        for name, tensor in task.model.state_dict().items():
            same = torch.equal(tensor, trained[name])
            assert not same if name.startswith(prefixes) and name.endswith("weight") and tensor.ndim > 1 else True
            assert same or name.startswith(prefixes)
        task.export(tmp_path / fresh[0], task.model.state_dict())
    with pytest.raises(QLIPError, match="model.fresh: stage 2 takes the encoder from stage 1 as it is"):
        load_without_text(checkpoint, ["encoder"])


# for fidelity alone


def test_without_lpips_and_gan_nothing_is_fetched_and_one_phase_is_left(
    checkpoint: Path, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path))
    task = make(checkpoint)
    assert [phase.name for phase in task.phases] == ["model"] and task.second is None and task.perceptual is None
    assert set(step(task, 0, [batch])) >= {"mse", "bsq"} and "lpips" not in step(task, 1, [batch])
    with pytest.raises(QLIPError, match="fetch it with `qlip data get lpips`"):
        make(checkpoint, losses={"alpha_p": 0.1})
    assert not list(tmp_path.iterdir())


def test_nothing_left_to_train_is_refused(checkpoint: Path) -> None:
    with pytest.raises(QLIPError, match="nothing to train"):
        make(checkpoint, model={"init": str(checkpoint), "locked": ["decoder", "bottleneck"]})


def test_a_locked_decoder_leaves_the_bottleneck(checkpoint: Path, batch: Batch) -> None:
    task = make(checkpoint, model={"init": str(checkpoint), "locked": ["decoder"]})
    before = state_of(task)
    step(task, 0, [batch])
    moved = {name for name, tensor in state_of(task).items() if not torch.equal(tensor, before[name])}
    assert not [name for name in moved if "vision_decoder" in name]
    assert [name for name in moved if "quant_embed_post" in name] and [name for name in moved if CODES[0] in name]
