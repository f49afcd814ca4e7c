"""Studies: their order, what is done again and what is not, and the table's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from qlip import QLIPError, QLIPModel, assets, recipes
from qlip.training.ablation import Ablation, Run, Study, load_study
from qlip.training.ablation_table import make_table, to_markdown, write_table
from qlip.training.recipe import check_recipe


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures with labels; and a cache without LPIPS' weights."""
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted(assets.path("pictures").glob("*.jpg"))[:3]:
        shutil.copy(path, folder)
        (folder / f"{path.stem}.json").write_text(json.dumps({"label": path.stem}))
    return folder


@pytest.fixture
def study(recipe_file: Path, pictures: Path) -> Study:
    """Two variants, the second from the first one's model, with two seeds."""
    return Study.model_validate(
        {
            "title": "which",
            "recipe": str(recipe_file),
            "seeds": [4, 2],
            "variants": {
                "plain": {"overrides": {"optimizer.lr": 1e-5, "data.sources.0.flip": 0}},
                "further": {"title": "from plain", "init_from": "plain"},
            },
            "measure": [
                {"data": str(pictures), "kind": "reconstruction"},
                {"data": str(pictures), "kind": "classification", "limit": 2, "templates": "cifar"},
            ],
        }
    )


def finish(ablation: Ablation, one: Run, checkpoint: Path) -> Path:
    """Put a run's files where training would have put them."""
    place = ablation.place(one)
    shutil.copytree(checkpoint, place / "model")
    (place / "recipe.yaml").write_text(ablation._recipes[one].to_yaml())
    return place


def test_the_first_seed_of_all_variants_comes_first(study: Study, tmp_path: Path) -> None:
    ablation = Ablation(study, tmp_path / "s")
    assert list(map(str, ablation.runs())) == [
        "plain, seed 4",
        "further, seed 4",
        "plain, seed 2",
        "further, seed 2",
    ]
    assert ablation.runs(["further"]) == [Run("further", 4), Run("further", 2)]
    with pytest.raises(QLIPError, match="plan: no such variant .did you mean 'plain'"):
        ablation.runs(["plan"])


def test_recipes_of_runs(study: Study, tmp_path: Path) -> None:
    ablation = Ablation(study, tmp_path / "s")
    plain, further = ablation._recipes[Run("plain", 2)], ablation._recipes[Run("further", 2)]
    assert (plain.seed, plain.optimizer.lr, plain.data.sources[0].flip) == (2, 1e-5, 0)
    assert further.model.init == str(tmp_path / "s" / "plain" / "seed-2" / "model")
    beside = study.model_copy(
        update={"variants": {"x": study.variants["further"].model_copy(update={"init_from": "other/y"})}}
    )
    assert Ablation(beside, tmp_path / "s")._recipes[Run("x", 2)].model.init == str(tmp_path / "other/y/seed-2/model")
    with pytest.raises(QLIPError, match="which is not there; train that variant first"):
        ablation.train(Run("further", 2))


def test_a_finished_run_is_known_and_another_recipes_is_refused(study: Study, tmp_path: Path, checkpoint: Path) -> None:
    ablation, one = Ablation(study, tmp_path / "s"), Run("plain", 4)
    assert not ablation.is_finished(one)
    place = finish(ablation, one, checkpoint)
    assert ablation.is_finished(one) and ablation.train(one) is None
    stored = yaml.safe_load((place / "recipe.yaml").read_text())
    # what an earlier version wrote, and what moves no weight
    stored["losses"] |= {"max_logit_scale": 50.0}
    del stored["accumulation"]
    (place / "recipe.yaml").write_text(yaml.safe_dump(stored | {"threads": 7}))
    assert ablation.is_finished(one)
    stored["data"]["sources"][0]["flip"] = 0.5
    (place / "recipe.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(QLIPError, match=r"another recipe, data\.sources\.0\.flip 0\.5 where 0\.0 is wanted"):
        ablation.train(one)


def test_what_was_measured_is_not_measured_again(study: Study, tmp_path: Path, checkpoint: Path) -> None:
    said: list[str] = []
    ablation, one = Ablation(study, tmp_path / "s", said.append), Run("plain", 4)
    place = finish(ablation, one, checkpoint)
    ablation.measure(one)
    assert len(said) == 2
    rebuilt, named = ablation.measurements(one)
    assert rebuilt["count"] == 3 and {"psnr", "ssim", "bits_dead"} <= rebuilt["values"].keys()
    assert named["count"] == 2 and named["values"]["classes"] == 2
    assert "lpips" not in rebuilt["values"]
    before = (place / "measurements.json").read_bytes()
    ablation.measure(one)
    assert len(said) == 2 and (place / "measurements.json").read_bytes() == before

    shorter = study.measure[0].model_copy(update={"limit": 1})
    changed = Ablation(study.model_copy(update={"measure": (shorter, study.measure[1])}), tmp_path / "s", said.append)
    changed.measure(one)
    assert said[2:] == [f"measuring plain, seed 4: reconstruction of {shorter.data}"]
    assert [found["count"] for found in changed.measurements(one)] == [1, 2]

    model = QLIPModel.from_pretrained(place / "model")
    with torch.no_grad():
        model.text_projection.weight.mul_(2)  # in none of the two fingerprints of codes and decoder
    model.save_pretrained(place / "model")
    assert ablation.measurements(one) == []
    ablation.measure(one)
    assert len(said) == 5 and len(ablation.measurements(one)) == 2


def test_the_table_has_mean_and_range_over_seeds(study: Study, tmp_path: Path, checkpoint: Path) -> None:
    ablation = Ablation(study, tmp_path / "s")
    for one, psnr in ((Run("plain", 4), 20.0), (Run("plain", 2), 23.0)):
        place = finish(ablation, one, checkpoint)
        ablation.measure(one)
        stored = json.loads((place / "measurements.json").read_text())
        stored["results"][0]["values"]["psnr"] = psnr
        (place / "measurements.json").write_text(json.dumps(stored))
    table = make_table(ablation)
    data = study.measure[0].data
    plain, further = table["rows"]
    assert plain["seeds"] == [4, 2] and further["seeds"] == [] and further["title"] == "from plain"
    summary = plain["values"][f"{data}/reconstruction/psnr"]
    assert summary == {"mean": 21.5, "min": 20.0, "max": 23.0, "seeds": 2}
    text = to_markdown(table)
    assert text.splitlines()[0].startswith(f"| which | seeds | {data} PSNR, dB | {data} SSIM | {data} dead bits |")
    assert text.splitlines()[2].startswith("| plain | 2 | 21.50 (20.00 to 23.00) |")
    assert text.splitlines()[3] == "| from plain | 0 | – | – | – | – |"
    assert f"- {data}, classification: 2 pictures, 32x32, bicubic, centre crop, prompts cifar" in text
    numbers, written = write_table(table, tmp_path / "s")
    assert json.loads(numbers.read_text()) == table and written.read_text() == text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": {}}, "unknown key 'variant' .did you mean 'variants'"),
        ({"variants": {"a": {"init_from": "b"}, "b": {}}}, "a starts from b, which is no variant further up"),
        ({"variants": {"../a": {}}}, "String should match pattern"),
        ({"seeds": []}, "at least 1 item"),
        ({"measure": [{"data": "x", "kind": "classification"}]}, "templates go with kind: classification"),
        ({"measure": [{"data": "x", "kind": "reconstruction", "limit": n} for n in (1, 2)]}, "x/reconstruction twice"),
    ],
)
def test_studies_written_wrong(tmp_path: Path, change: dict, said: str) -> None:
    values = yaml.safe_load((recipes.study_path("both-objectives") or Path()).read_text()) | change
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(QLIPError, match=said):
        load_study(str(path))


@pytest.mark.parametrize("name", recipes.studies())
def test_packaged_studies_are_whole(name: str, tmp_path: Path) -> None:
    study = load_study(f"studies/{name}")
    assert load_study(name) == study
    ablation = Ablation(study, tmp_path)
    assert len(ablation.runs()) == len(study.seeds) * len(study.variants)
    assert name not in recipes.names()
    with pytest.raises(QLIPError, match=f"did you mean '{name}'"):
        load_study(name + "s")


def test_both_objectives_are_the_paper_s_ratios(tmp_path: Path) -> None:
    ablation = Ablation(load_study("both-objectives"), tmp_path)
    found = {one.variant: ablation._recipes[one].losses for one in ablation.runs() if one.seed == 1}
    ratios = {name: (losses.alpha_r, losses.alpha_a) for name, losses in found.items() if name != "rule"}
    assert ratios == {
        "1to1e2": (100, 1),
        "1to0": (0, 1),
        "1to1e3": (1000, 1),
        "0to1": (100, 0),
        "1to1": (1, 1),
        "1to1e4": (10000, 1),
    }
    assert check_recipe(yaml.safe_load(ablation._recipes[Run("1to1", 1)].to_yaml()), "it").seed == 1
