"""`qlip tokens codec`, and `encode --entropy-code` with its tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qlip.tokens import Tables, TokenFile
from qlip.tokens.entropy.train_tables import ContextNetwork
from qlip.tokens.token_file import ENTROPY_CODED, RAW_BITS, read_header
from tests.cli.conftest import BITS, TOKEN_BYTES, Command, write_image


def test_codec_train__tables_are_used_by_encode_and_decode(
    qlip: Command, model: Path, photos: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(model, mine)

    ran = qlip("encode", photos / "cat.png", "-m", mine, "-o", "raw", "--entropy-code")
    assert ran.code == 0
    assert ran.error_lines == [
        f"note: {mine} has no entropy tables, so bits stay raw; `qlip tokens codec train` makes tables"
    ]
    assert read_header("raw/cat.qlip").coding == RAW_BITS

    for seed in range(8):  # few images, which the tables can memorise
        write_image(photos / f"{seed}.png", (48, 48), seed=seed)
    tables = mine / "entropy_tables.safetensors"
    ran = qlip("tokens", "codec", "train", photos, "-m", mine, "-o", tables, "--steps", 30, "--hidden", 4, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["digest"] == Tables.load(tables).digest
    assert (ran.json["images"], ran.json["raw_bits_a_token"]) == (11, BITS)
    assert [path.name for path in mine.glob("entropy*")] == [tables.name]  # no work folder is left

    ran = qlip("tokens", "codec", "report", photos, "-m", mine, "--json")
    (row,) = ran.json["results"]
    assert (row["images"], row["raw_bytes"]) == (11, TOKEN_BYTES)
    assert row["mean_bytes"] < TOKEN_BYTES - 8 and row["saved_percent"] > 20

    ran = qlip("encode", photos, "-m", mine, "-o", "coded", "--entropy-code", "--json")
    files = {row["output"]: row for row in ran.json["results"]}
    coded = {name for name in files if read_header(name).coding == ENTROPY_CODED}
    assert coded and all(files[name]["token_bytes"] < TOKEN_BYTES for name in coded)
    assert all(files[name]["file_bytes"] == Path(name).stat().st_size for name in files)
    assert qlip("encode", photos, "-m", mine, "-o", "coded", "--skip-existing", "--json").json["skipped"] == 11

    qlip("encode", photos, "-m", mine, "-o", "plain")
    for folder in ("coded", "plain"):
        assert qlip("decode", folder, "-m", mine, "-o", f"{folder}-rebuilt").code == 0
    for rebuilt in Path("plain-rebuilt").rglob("*.png"):
        assert rebuilt.read_bytes() == Path(str(rebuilt).replace("plain", "coded")).read_bytes()

    one = sorted(coded)[0]
    tag = Tables.load(tables).digest[:16]
    assert qlip("info", one, "--json").json["coding"] == f"entropy-coded, tables {tag}"
    ran = qlip("decode", one, "-m", model, "-o", "other")  # the same weights, without the tables
    assert ran.code == 1
    (line,) = ran.error_lines
    assert line.startswith(f"{one}: entropy-coded with the tables {tag}, but {model} has none; give the model")
    assert qlip("decode", one, "-m", model, "-o", "other", "--entropy-tables", tables).code == 0


def test_codec_train__stopped_training_continues(qlip: Command, model: Path, photos: Path, tmp_path: Path) -> None:
    def train(name: str) -> tuple[str, str]:
        ran = qlip(
            "tokens",
            "codec",
            "train",
            photos,
            "-m",
            model,
            "-o",
            tmp_path / name,
            "--steps",
            4,
            "--hidden",
            2,
            "--json",
        )
        assert ran.code == 0, ran.err
        return ran.json["digest"], ran.err

    from qlip.cli.dataset import tokens_codec as entropy
    from qlip.tokens.entropy import train_tables

    whole, _ = train("whole.safetensors")
    run, every = train_tables.TableTraining.run, entropy.SAVE_EVERY

    def stopped(self: train_tables.TableTraining, until: int | None = None, on_step=None) -> None:  # type: ignore[no-untyped-def]
        run(self, 2, on_step)
        raise KeyboardInterrupt

    try:
        entropy.SAVE_EVERY, train_tables.TableTraining.run = 1, stopped  # type: ignore[method-assign]
        ran = qlip(
            "tokens",
            "codec",
            "train",
            photos,
            "-m",
            model,
            "-o",
            tmp_path / "t.safetensors",
            "--steps",
            4,
            "--hidden",
            2,
        )
        assert ran.code == 130 and "run the same command to continue" in ran.err
    finally:
        entropy.SAVE_EVERY, train_tables.TableTraining.run = every, run  # type: ignore[method-assign]
    others = tmp_path / "t-work/another/bits.safetensors"
    others.parent.mkdir()
    others.write_bytes(b"of another training")
    again, said = train("t.safetensors")
    assert "continues from step 2" in said
    assert again == whole
    assert [path for path in (tmp_path / "t-work").rglob("*") if path.is_file()] == [others]


def test_codec_train__replaced_images_start_again(
    qlip: Command, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlip.cli.dataset import tokens_codec as entropy

    def stopped(self: Tables, *arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entropy, "SAVE_EVERY", 1)
    how = ("-m", model, "--steps", 2, "--hidden", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Tables, "save", stopped)
        assert qlip("tokens", "codec", "train", photos, *how, "-o", tmp_path / "t.safetensors").code == 130
    write_image(photos / "cat.png", (48, 48), seed=99)
    again = qlip("tokens", "codec", "train", photos, *how, "-o", tmp_path / "t.safetensors", "--json")
    fresh = qlip("tokens", "codec", "train", photos, *how, "-o", tmp_path / "fresh.safetensors", "--json")
    assert again.code == 0 and "continues" not in again.err and again.json["digest"] == fresh.json["digest"]


def test_codec_report__tables_of_other_tokens_are_refused(
    qlip: Command, model: Path, photos: Path, tmp_path: Path
) -> None:
    tables = tmp_path / "t.safetensors"
    Tables.from_network(ContextNetwork(BITS + 1, 2)).save(tables)
    ran = qlip("tokens", "codec", "report", photos, "-m", model, "--entropy-tables", tables)
    assert ran.code == 1 and f"{tables}: for tokens of {BITS + 1} bits, but {model} has {BITS}" in ran.err


def test_codec_train__stopped_after_the_last_step_reports_bits_per_token(
    qlip: Command, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlip.cli.dataset import tokens_codec as entropy

    def stopped(self: Tables, *arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entropy, "SAVE_EVERY", 1)
    command = (
        "tokens",
        "codec",
        "train",
        photos,
        "-m",
        model,
        "-o",
        tmp_path / "t.safetensors",
        "--steps",
        2,
        "--hidden",
        2,
    )
    with monkeypatch.context() as patch:
        patch.setattr(Tables, "save", stopped)
        assert qlip(*command).code == 130
    ran = qlip(*command, "--json")
    assert ran.code == 0 and 0 < ran.json["bits_a_token"] < 2 * BITS and "continues from step 1" in ran.err


def test_codec__wrong_usage(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("tokens", "codec", "train", photos, "-m", model, "-o", "tables.bin")
    assert (ran.code, ran.error_lines) == (
        2,
        ["qlip: tables.bin: tables are a .safetensors file; give such a name"],
    )
    ran = qlip("tokens", "codec", "report", photos, "-m", model)
    assert (ran.code, ran.error_lines) == (
        1,
        [f"qlip: {model}: has no entropy tables; make them with `qlip tokens codec train`"],
    )
    qlip("encode", photos / "cat.png", "-m", model)
    assert TokenFile.load("cat.qlip").bits_per_token == BITS
    ran = qlip("encode", photos / "cat.png", "-m", model, "--entropy-code", "--entropy-tables", "none.safetensors")
    assert ran.code == 1 and "none.safetensors: cannot be read" in ran.err
