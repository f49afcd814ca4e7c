"""Studies: their order, what is done again and what is not, and the table's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets, recipes
from qlip.data.sources.training_text import TrainingText
from qlip.evaluation.evaluators.zero_shot import ZeroShot
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.evaluation.report.result import Result, differences
from qlip.evaluation.run import evaluate_dataset as passes
from qlip.evaluation.run.evaluate import run_specs, specs_of
from qlip.training.recipe import check_recipe
from qlip.training.studies.ablation import Ablation, Measure, Run, Study, load_study
from qlip.training.studies.ablation_table import cells, columns, make_table, to_markdown, write_table

from ..weights import lpips_weights


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images with labels; and a cache without LPIPS' weights."""
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(assets.path("images").glob("*.jpg"))[:3]:
        shutil.copy(path, folder)
        (folder / f"{path.stem}.json").write_text(json.dumps({"label": path.stem}))
    return folder


@pytest.fixture
def study(recipe_file: Path, images: Path) -> Study:
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
                {"data": str(images), "evaluator": "reconstruction"},
                {"data": str(images), "evaluator": "zero_shot", "limit": 2, "settings": {"templates": "cifar"}},
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
    with pytest.raises(QLIPError, match="which does not exist; train that variant first"):
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
    with pytest.raises(QLIPError, match=r"another recipe: data\.sources\.0\.flip \(0\.5, now 0\.0\)"):
        ablation.train(one)


def test_what_was_measured_is_not_measured_again(study: Study, tmp_path: Path, checkpoint: Path) -> None:
    said: list[str] = []
    ablation, one = Ablation(study, tmp_path / "s", said.append), Run("plain", 4)
    place = finish(ablation, one, checkpoint)
    ablation.measure(one)
    data = study.measure[0].data
    assert said == [f"measuring plain, seed 4: reconstruction of {data}, zero_shot of {data}"]
    rebuilt, named = ablation.measurements(one)
    assert rebuilt.count == 3 and {"psnr", "ssim", "l1", "bits_per_pixel"} <= rebuilt.values.keys()
    assert named.count == 2 and named.values["prompt_classes"].value == 2
    before = (place / "results.json").read_bytes()
    ablation.measure(one)
    assert len(said) == 1 and (place / "results.json").read_bytes() == before
    assert not (place / "rows").exists()  # rows are for going on, and it is done

    shorter = study.measure[0].model_copy(update={"limit": 1})
    changed = Ablation(study.model_copy(update={"measure": (shorter, study.measure[1])}), tmp_path / "s", said.append)
    changed.measure(one)
    assert said[1:] == [f"measuring plain, seed 4: reconstruction of {data}"]
    assert [found.count for found in changed.measurements(one)] == [1, 2]

    model = QLIPModel.from_pretrained(place / "model")
    with torch.no_grad():
        model.text_projection.weight.mul_(2)  # in none of the two fingerprints of codes and decoder
    model.save_pretrained(place / "model")
    assert ablation.measurements(one) == []
    ablation.measure(one)
    assert said[2:] == said[:1] and len(ablation.measurements(one)) == 2


def test_a_result_is_what_qlip_eval_says_of_the_checkpoint(study: Study, tmp_path: Path, checkpoint: Path) -> None:
    ablation, one = Ablation(study, tmp_path / "s"), Run("plain", 4)
    place = finish(ablation, one, checkpoint)
    ablation.measure(one)
    stored = Result.load(place / "results.json")
    subject = QLIPEvalModel(*(kind.from_pretrained(checkpoint) for kind in (QLIPModel, QLIPProcessor)), "by hand")
    again = run_specs(subject, specs_of(stored))
    assert again is not None and differences(stored, again.result) == []
    assert stored.complete and stored.measured == again.result.measured
    stored.model_copy(update={"packages": {"torch": "0.1"}}).save(place / "results.json")
    ablation.measure(one)
    assert Result.load(place / "results.json").packages == {"torch": "0.1"}  # nothing is missing
    shorter = study.measure[0].model_copy(update={"limit": 1})
    changed = Ablation(study.model_copy(update={"measure": (shorter, study.measure[1])}), tmp_path / "s")
    changed.measure(one)
    fresh = Result.load(place / "results.json")
    assert fresh.packages == again.result.packages and [row.count for row in fresh.measured] == [1, 2]
    (place / "results.json").write_text("{")
    with pytest.raises(QLIPError, match=r"results\.json: not a valid result file .*; delete it to measure again"):
        changed.measure(one)


def test_a_stopped_measurement_goes_on(
    study: Study, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "CHUNK", 1)
    seen: list[str] = []
    rows = ZeroShot.rows

    def stopping(self: ZeroShot, batch: ModelBatch) -> dict[str, torch.Tensor]:
        seen.extend(batch.keys)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return rows(self, batch)

    monkeypatch.setattr(ZeroShot, "rows", stopping)
    said: list[str] = []
    ablation, one = Ablation(study, tmp_path / "s", said.append), Run("plain", 4)
    place = finish(ablation, one, checkpoint)
    with pytest.raises(KeyboardInterrupt):
        ablation.measure(one)
    assert [found.evaluator for found in ablation.measurements(one)] == ["reconstruction"]
    assert not Result.load(place / "results.json").complete
    ablation.measure(one)
    assert len(seen) == 3 and seen[1] == seen[2]  # the first image was not looked at again
    assert said[1:] == [f"measuring plain, seed 4: zero_shot of {study.measure[0].data}"]
    assert [found.count for found in ablation.measurements(one)] == [3, 2]
    assert Result.load(place / "results.json").complete and not (place / "rows").exists()


def test_ablation__classes_in_the_training_captions_count_as_trained(
    study: Study, tmp_path: Path, checkpoint: Path
) -> None:
    values = study.model_dump()
    values["measure"] = [values["measure"][1] | {"limit": None}]
    ablation = Ablation(Study.model_validate(values), tmp_path / "s")
    one = Run("plain", 2)
    place = finish(ablation, one, checkpoint)
    TrainingText.of(["a cat, an astronaut and coffee"], ["own"]).save(place / "model")
    ablation.measure(one)
    (named,) = ablation.measurements(one)
    assert named.notes["protocol"].startswith("prompt accuracy on trained classes: all 3 names occur in ")
    assert "trained_top1" in named.values and "zero_shot_top1" not in named.values


def test_what_needs_lpips_waits_for_its_weights(
    study: Study, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = study.measure[0].data
    measure = (
        Measure(data=data, evaluator="reconstruction", settings={"lpips": ["vgg"]}),
        Measure(data=data, evaluator="sets"),
    )
    said: list[str] = []
    assert Ablation(study, tmp_path / "s").left_out() is None  # no figure of this study is over LPIPS' network
    ablation = Ablation(study.model_copy(update={"measure": measure}), tmp_path / "s", said.append)
    one = Run("plain", 4)
    place = finish(ablation, one, checkpoint)
    assert str(ablation.left_out()).endswith("get them with qlip data get lpips")
    ablation.measure(one)
    ablation.measure(one)
    assert said == [f"measuring plain, seed 4: reconstruction of {data}"]
    (without,) = ablation.measurements(one)
    assert "lpips_vgg" not in without.values

    monkeypatch.delenv("QLIP_CACHE")
    lpips_weights()
    assert ablation.left_out() is None
    ablation.measure(one)
    full, sets = ablation.measurements(one)
    assert full.values["psnr"] == without.values["psnr"] and full.values["lpips_vgg"].value > 0
    assert sets.values["fd_vgg16"].value > 0 and "3 images for 512 features" in sets.notes["fd_vgg16"]
    before = (place / "results.json").read_bytes()
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    ablation.measure(one)
    assert len(said) == 2 and (place / "results.json").read_bytes() == before  # what is known stays known
    table = make_table(ablation)
    markdown = to_markdown(table)
    headings = ("PSNR, dB", "SSIM", "LPIPS (VGG)", "FD-VGG16")
    assert markdown.splitlines()[0] == f"| which | seeds | {' | '.join(f'{data} {one}' for one in headings)} |"
    assert f"- {data}/sets, fd_vgg16: 3 images for 512 features" in markdown
    assert "kd_vgg16" not in markdown and any(one["about"] == "kd_vgg16" for one in table["notes"])


def test_the_table_has_mean_and_range_over_seeds(study: Study, tmp_path: Path, checkpoint: Path) -> None:
    ablation = Ablation(study, tmp_path / "s")
    for one, psnr in ((Run("plain", 4), 20.0), (Run("plain", 2), 23.0)):
        place = finish(ablation, one, checkpoint)
        ablation.measure(one)
        stored = json.loads((place / "results.json").read_text())
        stored["measured"][0]["values"]["psnr"]["value"] = psnr
        (place / "results.json").write_text(json.dumps(stored))
    table = make_table(ablation)
    data = study.measure[0].data
    plain, further = table["rows"]
    assert plain["seeds"] == [4, 2] and further["seeds"] == [] and further["title"] == "from plain"
    assert plain["results"] == {"4": "plain/seed-4/results.json", "2": "plain/seed-2/results.json"}
    summary = plain["values"][f"{data}/reconstruction/psnr"]
    assert {name: summary[name] for name in ("mean", "min", "max", "seeds")} == {
        "mean": 21.5,
        "min": 20.0,
        "max": 23.0,
        "seeds": 2,
    }
    assert summary["by_seed"] == {"4": 20.0, "2": 23.0} and summary["unit"] == "dB"
    stored = Result.load(tmp_path / "s" / plain["results"]["4"])
    assert {key for key in plain["values"] if key.startswith(f"{data}/reconstruction/")} == {
        f"{data}/reconstruction/{name}" for name in stored.measured[0].values
    }
    text = to_markdown(table)
    assert text.splitlines()[0] == f"| which | seeds | {data} PSNR, dB | {data} SSIM | {data} prompt top-1, % |"
    assert text.splitlines()[2].startswith("| plain | 2 | 21.50 (20.00 to 23.00) |")
    assert text.splitlines()[3] == "| from plain | 0 | – | – | – |"
    assert f"- {data}/zero_shot: 2 images, 32x32, bicubic, centre crop, rules 2, prompts cifar" in text
    assert f"- {data}/zero_shot, protocol: prompt accuracy" in text and "ms_ssim" not in text
    numbers, written = write_table(table, tmp_path / "s")
    assert json.loads(numbers.read_text()) == table and written.read_text() == text


@pytest.mark.parametrize(
    ("unit", "seeds", "text"),
    [
        ("", [35.0002, 34.8, 35.2], "35.0 (34.8 to 35.2)"),  # the last digit is known, if it is 0
        ("", [287.6, 293.4], "290 (288 to 293)"),
        ("", [99.97], "100"),
        ("", [1234.4, 1236.4], "1,235 (1,234 to 1,236)"),
        ("", [0.0, 0.0], "0"),  # as it is written it does not vary
        ("", [0.0, 1.0], "0.500 (0 to 1)"),
        ("dB", [21.391, 21.394], "21.39"),
        ("%", [46.0, 47.0], "46.5 (46.0 to 47.0)"),
    ],
)
def test_figures_are_written_with_the_digits_that_they_have(unit: str, seeds: list[float], text: str) -> None:
    mean, by_seed = sum(seeds) / len(seeds), {str(seed): one for seed, one in enumerate(seeds)}
    value = {"unit": unit, "mean": mean, "min": min(seeds), "max": max(seeds), "seeds": len(seeds), "by_seed": by_seed}
    row = {
        "variant": "a",
        "title": "a",
        "seeds": list(range(len(seeds))),
        "results": {},
        "values": {"x/own/figure": value},
    }
    table = {"title": "which", "measure": [{"data": "x", "evaluator": "own"}], "rows": [row], "notes": [], "about": []}
    assert cells(table) == [["a", str(len(seeds)), text]]


def test_of_a_probe_s_forty_figures_the_first_ones_are_shown() -> None:
    """As the paper's table has them: of the class token, of the patches' mean, of both."""
    one = {"unit": "%", "mean": 50.0, "min": 50.0, "max": 50.0, "seeds": 1, "by_seed": {"0": 50.0}}
    features = ("cls", "mean", "both")
    figures = [f"{of}_{feature}_top{k}" for feature in features for of in ("linear", "knn") for k in (1, 5)]
    figures += [f"few_shot_{feature}_{shots}_shot" for feature in features for shots in (1, 2, 4, 8, 16)]
    row = {"variant": "a", "title": "a", "seeds": [0], "values": {f"x/probe/{figure}": one for figure in figures}}
    table = {"title": "which", "measure": [{"data": "x", "evaluator": "probe"}], "rows": [row]}
    assert [heading for _, heading, _ in columns(table)] == [
        *(f"x linear {feature} top-1, %" for feature in features),
        "x knn cls top-1, %",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": {}}, "unknown key 'variant' .did you mean 'variants'"),
        ({"variants": {"a": {"init_from": "b"}, "b": {}}}, "a starts from b, which is not an earlier variant"),
        ({"variants": {"../a": {}}}, "String should match pattern"),
        ({"seeds": []}, "at least 1 item"),
        (
            {"measure": [{"data": "x", "evaluator": "zeroshot"}]},
            "zeroshot: no such evaluator .did you mean",
        ),
        (
            {"measure": [{"data": "x", "evaluator": "codebook", "settings": {"tide": 1}}]},
            r"codebook\.tide: no such setting \(did you mean 'codebook\.tied'\?\)",
        ),
        ({"measure": [{"data": "x", "evaluator": "probe"}]}, "probe: needs a dataset to train on"),
        ({"measure": [{"data": "x", "evaluator": "codebook", "limit": n} for n in (1, 2)]}, "x/codebook twice"),
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
    by_name = {measure.name: measure.item for measure in study.measure}
    assert {"cifar10:test/reconstruction", "cifar10:test/sets", "emoji:twemoji/sets"} <= by_name.keys()
    assert by_name["cifar10:test/zero_shot"].settings == {"templates": "cifar"}
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
