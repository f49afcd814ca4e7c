"""Readers of benchmarks' prompt files, as each benchmark ships them; every prompt knows its file and line."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlip.errors import QLIPError
from qlip.files import read_lines, text_of

COLUMN = "Prompt"
"""Column of the tables of COCO-30k and PartiPrompts."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
        text: what to draw.
        where: file and line, for errors.
        name: id in the benchmark, or the whole line of GenEval's file; "" where it is the place in the file.
        group: category or style; "" where there is none.
    """

    text: str
    where: str
    name: str = ""
    group: str = ""


def geneval(path: Path) -> list[Prompt]:
    """Read GenEval's ``evaluation_metadata.jsonl``, one object with ``prompt`` per line."""
    found = []
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {number}"
        values = _json(line, where)
        if not isinstance(values, dict) or not isinstance(values.get("prompt"), str) or "tag" not in values:
            raise QLIPError(
                f"{where}: not a line of GenEval's evaluation_metadata.jsonl (an object with tag and prompt)"
            )
        found.append(Prompt(values["prompt"], where, line.strip()))
    return found


def table(path: Path) -> list[Prompt]:
    """Read the column ``Prompt`` of a table with tabs: LlamaGen's ``coco_captions.csv``, ``PartiPrompts.tsv``."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t")
    try:
        if COLUMN not in (reader.fieldnames or ()):
            raise QLIPError(f"{path}: its first line has no column {COLUMN}; give the benchmark's own file")
        found = [Prompt(row[COLUMN] or "", f"{path}, line {reader.line_num}") for row in reader]
    except csv.Error as error:
        raise QLIPError(f"{path}, line {reader.line_num}: not a table with tabs ({error})") from None
    for prompt in found:
        if len(prompt.text.splitlines()) > 1:
            raise QLIPError(
                f"{prompt.where}: the prompt has a line break, and scorers read captions.txt by lines; remove it"
            )
    return found


def texts(folder: Path) -> list[Prompt]:
    """Read DPG-Bench's folder of prompts, ``ID.txt`` each, in the order of their names."""
    found = []
    for path in _files(folder, "*.txt"):
        if "." in path.stem:
            raise QLIPError(f"{path}: the scorer reads an id up to the first dot; rename the file")
        found.append(Prompt(_text(path).strip(), str(path), path.stem))
    return found


def mjhq(path: Path) -> list[Prompt]:
    """Read MJHQ-30K's ``meta_data.json``: ``{id: {"category", "prompt"}}``."""
    values, found = _json(_text(path), str(path)), []
    if not isinstance(values, dict):
        raise QLIPError(f"{path}: not MJHQ-30K's meta_data.json, an object of ids")
    for name, one in values.items():
        where = f"{path}, {name}"
        if not isinstance(one, dict) or not all(isinstance(one.get(key), str) for key in ("category", "prompt")):
            raise QLIPError(f"{where}: not {{category, prompt}}; give MJHQ-30K's meta_data.json")
        for part in (name, one["category"]):
            if not part or {"/", "\0"} & set(part) or part.startswith("."):
                raise QLIPError(f"{where}: {part!r} cannot be a file's name")
        found.append(Prompt(one["prompt"], where, name, one["category"]))
    return found


COMPBENCH = ("color", "shape", "texture", "spatial", "non_spatial", "complex", "numeracy", "3d_spatial")
"""Categories of T2I-CompBench(++)."""


def compbench(path: Path) -> list[Prompt]:
    """Read T2I-CompBench's ``CATEGORY_val.txt``, one prompt per line: one file, or all that a folder has."""
    names = {f"{one}_val.txt": one for one in COMPBENCH}
    files = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if not files or files[0].name not in names:
        raise QLIPError(f"{path}: give T2I-CompBench's folder examples/dataset, or a file of it: {', '.join(names)}")
    found = []
    for file in files:
        for number, line in enumerate(read_lines(file), 1):
            where, text = f"{file}, line {number}", line.strip()
            if bad := sorted({"_", "/"} & set(text)):
                raise QLIPError(
                    f"{where}: has {' and '.join(map(repr, bad))}, and scorers read the prompt from the image's name,"
                    " up to the first _; reword it"
                )
            if len(text.encode()) > 244:  # _000000.png follows, and a name has 255 bytes at most
                raise QLIPError(f"{where}: too long for a file's name; shorten it to 244 bytes")
            found.append(Prompt(text, where, group=names[file.name]))
    return found


HPSV2 = ("anime", "concept-art", "paintings", "photo")
"""Styles of HPSv2's benchmark."""


def hpsv2(path: Path) -> list[Prompt]:
    """Read HPSv2's prompts: its folder with ``STYLE.json`` each, or one file of ``benchmark_prompts("all")``."""
    if path.is_dir():
        files = {style: path / f"{style}.json" for style in HPSV2 if (path / f"{style}.json").is_file()}
        values: Any = {style: _json(_text(file), str(file)) for style, file in files.items()}
    else:
        values, files = _json(_text(path), str(path)), dict.fromkeys(HPSV2, path)
    if not isinstance(values, dict) or not values or not set(values) <= set(HPSV2):
        raise QLIPError(f"{path}: not HPSv2's prompts; give its folder with {', '.join(HPSV2)} .json")
    found = []
    for style, prompts in values.items():
        if not isinstance(prompts, list) or not all(isinstance(one, str) for one in prompts):
            raise QLIPError(f"{files[style]}: {style} is not a list of prompts")
        found += [Prompt(text, f"{files[style]}, {style} {at}", group=style) for at, text in enumerate(prompts)]
    return found


def _files(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        raise QLIPError(f"{folder}: no such folder; give the benchmark's folder of prompts")
    found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
    if not found:
        raise QLIPError(f"{folder}: no {pattern} in it; give the benchmark's folder of prompts")
    return found


def _text(path: Path) -> str:
    try:
        return text_of(path.read_bytes(), str(path))
    except OSError as error:
        raise QLIPError(f"{path}: {error.strerror or error}; give the benchmark's own file") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise QLIPError(f"{where}: not JSON; give the benchmark's own file") from None
