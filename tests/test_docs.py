"""Commands in README, docs, the model's card and help texts exist, with the options that they are shown with."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import typer

from qlip import ImageCodec, assets
from qlip.cli.main import app
from qlip.cli.main import run as qlip
from tests.t2i.conftest import drawer_folder  # noqa: F401
from tests.vlm.conftest import talker_folder  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
    + [page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md"]  # the log keeps commands of its day
    + list((ROOT / "src" / "qlip").rglob("*.md"))
    + list((ROOT / "src" / "qlip" / "recipes").rglob("*.yaml"))
)
COMMANDS: Any = typer.main.get_command(app)


def commands_of(text: str) -> Iterator[str]:
    """Command lines: whole lines of code blocks, comments in recipes, and inline code."""
    text = text.replace("\\\n", " ")
    yield from re.findall(r"^(?:    |#   )(?:[A-Z]+=\S+ )*(?:\S*/)?(qlip .*)$", text, re.MULTILINE)
    yield from re.findall(r"`(qlip [^`]+)`", text)


def problem_of(line: str) -> str | None:
    """The reason why a command line cannot be typed; None if it can."""
    command, words = COMMANDS, shlex.split(line.split(" # ")[0])[1:]
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    group = hasattr(command, "commands") and not command.invoke_without_command
    if group and words and re.fullmatch("[a-z-]+", words[0]) and not words[0].startswith("-"):
        return f"no command {words[0]!r}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h", "--debug"}
    for word in words:
        option = word.split("=")[0]
        if re.fullmatch(r"--[a-z-]+|-[a-z]", option) and option not in known:
            return f"no option {option}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages__show_commands_that_exist(page: Path) -> None:
    wrong = []
    for line in commands_of(page.read_text(encoding="utf-8")):
        try:
            problem = problem_of(line)
        except ValueError as error:  # an unclosed quote
            problem = str(error)
        if problem is not None:
            wrong.append(f"{line}: {problem}")
    assert not wrong, "\n".join(wrong)


def test_pages__many_commands_are_found() -> None:
    """The test above would pass over pages whose commands it does not recognise."""
    assert sum(len(list(commands_of(page.read_text()))) for page in PAGES) > 150


def run_python(page: Path, **names: object) -> dict[str, object]:
    """Run the Python blocks of a page in order, which see ``names``, and return all names."""
    programs = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert programs
    for program in programs:
        exec(compile(program, str(page), "exec"), names)
    return names


def test_readme__python_blocks_run(
    tmp_path: Path,
    drawer_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "BUNDLED_DRAWER", str(drawer_folder))
    shutil.copy(assets.path("images", "cat.jpg"), "photo.jpg")
    names: dict[str, Any] = run_python(ROOT / "README.md")
    assert names["tokens"].grid == (8, 8) and names["image"].size == (64, 64)
    assert Path("rebuilt.png").exists() and capsys.readouterr().out.startswith("tensor([[")


def test_draw_page__python_block_runs(
    tmp_path: Path,
    drawer_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "BUNDLED_DRAWER", str(drawer_folder))
    output: Any = run_python(ROOT / "docs" / "draw.md")["output"]
    assert len(output.images) == 4 and output.indices.shape == (4, 64, 4) and Path("circle.png").exists()


def test_codec_page__python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [tokens] = ImageCodec.from_pretrained("bundled").encode([assets.path("images", "rocket.jpg")])
    tokens.save("photo.qlip")
    names = run_python(ROOT / "docs" / "tokens-codec.md", packed=[tokens.bits])
    assert names["packed"] == [tokens.bits]
    assert Path("smaller.qlip").stat().st_size < Path("photo.qlip").stat().st_size


def test_llava_page__python_block_runs(
    tmp_path: Path,
    talker_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(assets.path("images", "cat.jpg"), "photo.jpg")
    names: dict[str, Any] = run_python(ROOT / "docs" / "llava.md", model=talker_folder)
    assert len(names["answers"]) == 2 and len(names["chat"].turns) == 0


def test_decoder_page__trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    page = (ROOT / "docs" / "decoder.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (qlip .*)$", page.split("## Heads")[0], re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["tokenize", "train", "info"]
    for line in lines:
        words = shlex.split(line)[1:]
        assert qlip([*words, *(["schedule.steps=2"] if words[0] == "train" else [])]) == 0
    names: dict[str, Any] = run_python(ROOT / "docs" / "decoder.md")
    assert [image.size for image in names["images"]] == [(64, 64), (64, 64)]
    assert names["bits"].shape == names["marginals"].shape == (18,)
    assert names["marginals"].mean() < names["bits"].mean() < 64 * 28  # two steps


def test_contributing__index_leads_to_what_exists() -> None:
    rows = re.findall(r"^\| [^|]+\? \| `([\w.]+):([\w.]+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) == 11
    for module, name in rows:
        attrgetter(name)(import_module(module))
