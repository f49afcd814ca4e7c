"""Plans of the tokenizer's recipes: model, parts, sources and what ranks would read, without a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from qlip import QLIPError, QLIPModel
from qlip.data.loader.feed import share_of
from qlip.modeling import Preprocessing
from qlip.modeling.parts import qlip_groups
from qlip.training import job, load_recipe, run
from qlip.training.dry_run import parts_of
from qlip.training.optim.optimizers import build_optimizers
from qlip.training.plan import make_plan
from qlip.training.tasks.build import open_training_feed
from qlip.training.tasks.plan import find_config
from qlip.training.tasks.recipe import Stage2Recipe, TokenizerRecipe

DEBUG = "QLIP-B-16-256/debug-stage1"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(name: str = DEBUG, *overrides: str) -> TokenizerRecipe:
    recipe = load_recipe(name, list(overrides))
    assert isinstance(recipe, TokenizerRecipe)
    return recipe


def test_parts__have_the_optimizers_rates() -> None:
    recipe = recipe_of(DEBUG, "optimizer.layer_decay=0.5", "model.locked=[text]")
    found = parts_of(make_plan(recipe))
    model = QLIPModel(find_config(recipe)[0])
    assert sum(part.parameters for part in found) == sum(parameter.numel() for parameter in model.parameters())
    parts = {part.part: part for part in found}
    assert parts["text"].trained == 0 and parts["text"].rates is None
    named = model.vision_decoder.named_parameters(prefix="vision_decoder")
    (optimizer,) = build_optimizers(named, recipe.optimizer, qlip_groups(model), recipe.optimizer.parts)
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    assert parts["decoder"].rates == (min(rates), max(rates))
    assert parts["decoder"].rates[1] == 2e-3


def test_parts__tell_muons_rates_apart() -> None:
    plan = make_plan(recipe_of(DEBUG, "optimizer={name: muon, muon_lr: 0.004}"))
    parts = {part.part: part for part in parts_of(plan)}
    assert parts["encoder"].rates == (1e-3, 1e-3) and parts["encoder"].muon_rates == (4e-3, 4e-3)
    assert parts["bottleneck"].muon_rates is None


def test_sources__have_the_mixtures_shares(shards: str) -> None:
    sources = f"[{{path: bundled, weight: 3}}, {{path: '{shards}', weight: 1}}, {{path: nowhere, weight: 1}}]"
    found, ranks, notes = make_plan(recipe_of(DEBUG, f"data.sources={sources}", "schedule.steps=1000")).read(1)
    assert [source.share for source in found] == [0.6, 0.2, 0.2]
    assert [source.samples for source in found] == [4800, 1600, 1600]
    assert [source.images for source in found] == [18, 40, None]
    assert found[2].missing is not None and "nowhere" in found[2].missing and "not all sources" in notes[0]
    assert found[1].epochs == 40 and found[2].epochs is None and not ranks


def test_ranks__read_what_a_run_reads() -> None:
    recipe = recipe_of()
    plan = make_plan(recipe)
    side = find_config(recipe)[0].vision_config.image_size
    feed = open_training_feed(recipe, Preprocessing((side, side), side, patch_size=16), None)
    for rank, told in enumerate(plan.read(3)[1]):
        batch, _ = next(feed.open(None, rank=rank, world=3))
        assert list(told.keys) == batch.keys[: len(told.keys)] and told.keys
        assert (told.first, told.last + 1) == share_of(8, rank, 3)
        assert len(batch) == told.last - told.first + 1


def test_sources__streamed_are_not_counted(shards: str) -> None:
    source = f"{{path: '{shards}', streaming: true, lanes: 2, turns: 1}}"
    (found,), ranks, _ = make_plan(recipe_of(DEBUG, f"data.sources.0={source}")).read(2)
    assert found.streamed and found.images is None and found.missing is None
    first, second = (reads.keys for reads in ranks)
    assert first[0].startswith("cursor 0: ") and second[0].startswith("cursor 1: ")
    assert first[0].endswith(".tar") and first[0][8:] != second[0][8:]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("stage1", ["losses={alpha_r: 1, alpha_a: 0}", "optimizer.parts={}"]),
        ("stage2", ["losses={alpha_r: 0, alpha_p: 0, alpha_g: 0.1}"]),  # rebuilt for the discriminator alone
    ],
)
def test_flops__are_those_that_a_run_counts(
    elsewhere: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, overrides: list[str]
) -> None:
    monkeypatch.setattr(job, "device_peak", lambda device: 1e12)
    same = [f"model={{init: '{checkpoint}'}}", "schedule={steps: 1}", "micro_batch_size=null", "log={every: 1}"]
    overrides = [*same, *overrides, *["vocabulary=null"] * (name == "stage1")]
    recipe = load_recipe(f"QLIP-B-16-256/debug-{name}", overrides)
    run(recipe, elsewhere / "run", Console(quiet=True))
    count = make_plan(recipe).flops
    assert count is not None
    line = json.loads((elsewhere / "run/log.jsonl").read_text())
    assert line["mfu"] * 1e12 / line["samples_per_s"] == pytest.approx(count())


def test_find_config__stage_2_has_the_architecture_of_the_run_before_it(elsewhere: Path) -> None:
    recipe = recipe_of("QLIP-L-14-392/debug-stage2")
    config, notes = find_config(recipe)
    assert config.vision_config.patch_size == 14 and config.vision_config.image_size == 56
    assert "QLIP-L-14-392/debug-stage1" in notes[0]
    assert isinstance(recipe, Stage2Recipe)
    parts = {part.part for part in parts_of(make_plan(recipe))}
    assert parts == {"encoder", "decoder", "bottleneck", "discriminator"}  # no text tower is loaded


def test_find_config__reads_a_checkpoint_that_is_there(elsewhere: Path, checkpoint: Path) -> None:
    config, notes = find_config(recipe_of(DEBUG, f"model={{init: '{checkpoint}'}}", "vocabulary=null"))
    assert notes == [] and config.vision_config.quantizer_cfg.embed_dim == 12


def test_find_config__refuses_an_unknown_architecture(elsewhere: Path) -> None:
    recipe = recipe_of(DEBUG, "model={init: ./somewhere/else}", "vocabulary=null")
    with pytest.raises(QLIPError, match="the architecture is unknown") as call:
        make_plan(recipe)
    assert "\n" not in str(call.value)
