"""`qlip recipe dry-run`: what is told is what a run would do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qlip import QLIPConfig, QLIPError, QLIPModel
from qlip.cli.main import run as qlip
from qlip.data.loader.feed import share_of
from qlip.modeling.parts import qlip_groups
from qlip.training import job, load_recipe, run
from qlip.training.optim.optimizers import build_optimizers
from qlip.training.parallel.distributed import Parallel
from qlip.training.tasks.build import open_training_feed
from qlip.training.tasks.dry_run import dry_run, find_config
from qlip.training.tasks.memory import GIB
from qlip.training.tasks.recipe import Stage1Recipe, Stage2Recipe

DEBUG = "QLIP-B-16-256/debug-stage1"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_parts_and_rates_are_the_optimizers() -> None:
    recipe = load_recipe(DEBUG, ["optimizer.layer_decay=0.5", "model.locked=[text]"])
    found = dry_run(recipe)
    model = QLIPModel(found.config)
    assert sum(part.parameters for part in found.parts) == sum(parameter.numel() for parameter in model.parameters())
    parts = {part.part: part for part in found.parts}
    assert parts["text"].trained == 0 and parts["text"].rates is None
    named = model.vision_decoder.named_parameters(prefix="vision_decoder")
    (optimizer,) = build_optimizers(named, recipe.optimizer, qlip_groups(model), recipe.optimizer.parts)
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    assert parts["decoder"].rates == (min(rates), max(rates))
    assert parts["decoder"].rates[1] == 2e-3


def test_muons_rates_are_told_apart() -> None:
    parts = {part.part: part for part in dry_run(load_recipe(DEBUG, ["optimizer={name: muon, muon_lr: 0.004}"])).parts}
    assert parts["encoder"].rates == (1e-3, 1e-3) and parts["encoder"].muon_rates == (4e-3, 4e-3)
    assert parts["bottleneck"].muon_rates is None


def test_counts_of_samples_and_tokens() -> None:
    found = dry_run(load_recipe(DEBUG), world=2)
    assert (found.batch_size, found.steps, found.samples) == (8, 6, 48)
    assert found.image_tokens == 16 and found.text_tokens == 32
    assert (found.micro_batches, found.samples_at_a_time) == (1, 4)
    assert dry_run(load_recipe(DEBUG), world=1).micro_batches == 2
    assert dry_run(load_recipe(DEBUG, ["losses={alpha_a: 0}", "optimizer.parts={}"])).text_tokens == 0
    (source,) = found.sources
    assert source.images == 18 and source.epochs == pytest.approx(48 / 18)
    assert found.schedule[0] == (0, 0.5) and found.schedule[-1][0] == 5


def test_shares_of_sources_are_the_mixtures(shards: str) -> None:
    sources = f"[{{path: bundled, weight: 3}}, {{path: '{shards}', weight: 1}}, {{path: nowhere, weight: 1}}]"
    found = dry_run(load_recipe(DEBUG, [f"data.sources={sources}", "schedule.steps=1000"]))
    assert [source.share for source in found.sources] == [0.6, 0.2, 0.2]
    assert [source.samples for source in found.sources] == [4800, 1600, 1600]
    assert [source.images for source in found.sources] == [18, 40, None]
    assert found.sources[2].missing is not None and "nowhere" in found.sources[2].missing
    assert found.sources[1].epochs == 40 and found.sources[2].epochs is None and not found.ranks


def test_ranks_read_what_a_run_reads() -> None:
    recipe = load_recipe(DEBUG)
    found = dry_run(recipe, world=3)
    feed = open_training_feed(recipe, _preprocessing(found.config), None)
    for rank, told in enumerate(found.ranks):
        batch, _ = next(feed.open(None, rank=rank, world=3))
        assert list(told.keys) == batch.keys[: len(told.keys)] and told.keys
        assert (told.first, told.last + 1) == share_of(8, rank, 3)
        assert len(batch) == told.last - told.first + 1


def test_streamed_shards_are_told_without_counting(shards: str) -> None:
    source = f"{{path: '{shards}', streaming: true, lanes: 2, turns: 1}}"
    found = dry_run(load_recipe(DEBUG, [f"data.sources.0={source}"]), world=2)
    assert found.sources[0].streamed and found.sources[0].images is None and found.sources[0].missing is None
    first, second = (reads.keys for reads in found.ranks)
    assert first[0].startswith("cursor 0: ") and second[0].startswith("cursor 1: ")
    assert first[0].endswith(".tar") and first[0][8:] != second[0][8:]


def _preprocessing(config: QLIPConfig):
    from qlip.modeling import Preprocessing

    side = config.vision_config.image_size
    return Preprocessing((side, side), side, patch_size=config.vision_config.patch_size)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("stage1", ["losses={alpha_r: 1, alpha_a: 0}", "optimizer.parts={}"]),
        ("stage2", ["losses={alpha_r: 0, alpha_p: 0, alpha_g: 0.1}"]),  # rebuilt for the discriminator alone
    ],
)
def test_operations_are_those_that_a_run_counts(
    elsewhere: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, overrides: list[str]
) -> None:
    monkeypatch.setattr(job, "device_peak", lambda device: 1e12)
    same = [f"model={{init: '{checkpoint}'}}", "schedule={steps: 1}", "micro_batch_size=null", "log={every: 1}"]
    recipe = load_recipe(f"QLIP-B-16-256/debug-{name}", [*same, *overrides, *["vocabulary=null"] * (name == "stage1")])
    run(recipe, elsewhere / "run", Console(quiet=True))
    line = json.loads((elsewhere / "run/log.jsonl").read_text())
    assert line["mfu"] * 1e12 / line["samples_per_s"] == pytest.approx(dry_run(recipe).flops)


# ---------------------------------------------------------------------- without data or checkpoint


@pytest.mark.parametrize(
    "name",
    [
        "QLIP-B-16-256",
        pytest.param("QLIP-B-8-256", marks=pytest.mark.slow),
        pytest.param("QLIP-L-14-392", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_published_recipes_fit_their_devices(elsewhere: Path, name: str, stage: str) -> None:
    found = dry_run(load_recipe(f"{name}/{stage}"), world=128, memory=74.5)  # 80 GB
    assert found.fits, found.memory
    assert found.config == QLIPConfig.named(name)
    assert found.ranks == [] and found.sources[0].missing is not None
    assert any("not there yet" in note for note in found.notes)
    assert any("not all sources" in note for note in found.notes)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_single_gpus_recipe_fits_as_it_says(elsewhere: Path, stage: str) -> None:
    assert 22.3 * GIB < dry_run(load_recipe(f"single-gpu/{stage}"), memory=74.5).memory.total < 74.5 * GIB
    assert dry_run(load_recipe(f"single-gpu/{stage}", ["micro_batch_size=32"]), memory=22.3).fits  # 24 GB


def test_stage_2_finds_the_architecture_of_the_run_before_it(elsewhere: Path) -> None:
    recipe = load_recipe("QLIP-L-14-392/debug-stage2")
    config, notes = find_config(recipe)
    assert config.vision_config.patch_size == 14 and config.vision_config.image_size == 56
    assert "QLIP-L-14-392/debug-stage1" in notes[0]
    assert isinstance(recipe, Stage2Recipe)
    found = dry_run(recipe)
    assert {part.part for part in found.parts} == {"encoder", "decoder", "bottleneck"}  # no text tower is loaded


def test_a_checkpoint_that_is_there_is_read(elsewhere: Path, checkpoint: Path) -> None:
    recipe = load_recipe(DEBUG, [f"model={{init: '{checkpoint}'}}", "vocabulary=null"])
    config, notes = find_config(recipe)
    assert notes == [] and config.vision_config.quantizer_cfg.embed_dim == 12


def test_an_unknown_architecture_is_an_error(elsewhere: Path) -> None:
    recipe = load_recipe(DEBUG, ["model={init: ./somewhere/else}", "vocabulary=null"])
    with pytest.raises(QLIPError, match="the architecture is unknown") as call:
        dry_run(recipe)
    assert "\n" not in str(call.value)


def test_ranks_that_cannot_share_are_an_error() -> None:
    with pytest.raises(QLIPError, match="a rank would get no sample"):
        dry_run(load_recipe(DEBUG), world=9)
    with pytest.raises(QLIPError, match="not a multiple of 3"):
        dry_run(load_recipe(DEBUG, ["parallel={kind: fsdp, shard: 3}"]), world=4)


def test_one_process_ignores_how_ranks_would_share(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(DEBUG, ["parallel={kind: fsdp, shard: 3}"])
    assert dry_run(recipe, world=1).world == 1
    with Parallel(recipe) as parallel:  # a run says the same
        assert parallel.world == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(QLIPError, match="4 ranks are not a multiple of 3"):
        Parallel(recipe)


# ---------------------------------------------------------------------- remedies


@pytest.mark.parametrize(
    ("name", "world", "memory"),
    [("QLIP-B-8-256/stage1", 128, 30), ("QLIP-L-14-392/stage2", 128, 24), ("single-gpu/stage1", 1, 16)],
)
def test_each_remedy_does_what_it_says(elsewhere: Path, name: str, world: int, memory: float) -> None:
    found = dry_run(load_recipe(name), world, memory)
    assert not found.fits and found.remedies
    for remedy in found.remedies:
        assert remedy.fits
        again = dry_run(load_recipe(name, list(remedy.settings)), world, memory)
        assert again.fits and again.memory.total == remedy.total


@pytest.mark.slow
def test_remedies_are_taken_together_where_none_is_enough(elsewhere: Path) -> None:
    overrides = ["losses.align.chunk_size=null", "micro_batch_size=null", "activation_checkpointing=false"]
    found = dry_run(load_recipe("QLIP-B-16-256/stage1", overrides), 1, 74.5)
    (remedy,) = found.remedies
    assert remedy.fits and "losses.align.chunk_size=256" in remedy.settings and len(remedy.settings) > 1
    hopeless = dry_run(load_recipe(DEBUG), 1, 0.5)
    assert not any(remedy.fits for remedy in hopeless.remedies) and hopeless.remedies


# ---------------------------------------------------------------------- the command


def test_the_command_says_it_all(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qlip(["recipe", "dry-run", DEBUG, "--world-size", "2", "--memory", "8"]) == 0
    said = capsys.readouterr().out
    texts = (
        "nothing is trained",
        "peak learning rate",
        "0.002",
        "image tokens",
        "lamb state",
        "it fits",
        "of 8.00 GiB",
    )
    assert all(text in said for text in texts)
    assert "rank 1 reads positions 4 to 7 first: bundled/" in said
    assert not list(elsewhere.iterdir())  # no run folder


def test_the_command_says_what_does_not_fit(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qlip(["recipe", "dry-run", "QLIP-B-8-256/stage1", "--world-size", "128", "--memory", "30"]) == 0
    said = capsys.readouterr().out
    assert "it does NOT fit" in said and "micro_batch_size=128 fits" in said and "missing: datacomp-1b" in said


def test_the_command_as_json(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qlip(["recipe", "dry-run", DEBUG, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 48 and report["fits"] and report["memory"]["total"] < GIB
    assert report["sources"][0]["epochs"] == pytest.approx(48 / 18)
    assert report["config"]["vision_config"]["patch_size"] == 16


def test_world_is_torchruns_by_default(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert qlip(["recipe", "dry-run", DEBUG, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ranks"]) == 4


def test_both_kinds_of_recipes_are_known() -> None:
    assert isinstance(load_recipe(DEBUG), Stage1Recipe)
    assert torch.get_default_device().type == "cpu"  # meta was left again
