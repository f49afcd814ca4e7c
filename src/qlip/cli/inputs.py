"""From what a person typed (files, folders, patterns) to the list of files and the names of what is made from them."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlip.cli.console import note, usage_error

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .png .webp .avif .bmp .gif .tif .tiff .jp2 .ppm .pgm .pbm .tga .ico".split()
)
"""What is looked for in folders; a file that is named outright may have any ending."""

TOKEN_SUFFIXES = frozenset({".qlip"})


@dataclass(frozen=True)
class Input:
    """One file to work on.

    Attributes:
        path: where it is.
        name: what is made from it is called so, plus a suffix; unique, with the subfolders of a folder that was given.
    """

    path: Path
    name: str

    def output(self, folder: Path, suffix: str) -> Path:
        """Where its result goes."""
        return folder / f"{self.name}{suffix}"


def find(arguments: Sequence[str], suffixes: frozenset[str], what: str) -> list[Input]:
    """Every file that the arguments mean, in their order, folders and patterns sorted, each file once.

    Args:
        arguments: files, folders (searched with their subfolders), or glob patterns that the shell left alone.
        suffixes: which files of a folder count.
        what: "image" or ".qlip file", for messages.

    Raises:
        UsageError: nothing there, or two inputs whose results would have one name.
    """
    found: dict[Path, tuple[Path, Path]] = {}  # resolved path -> (path, name with suffix)
    for argument in arguments:
        for path, name in _expand(argument, suffixes, what):
            found.setdefault(path.resolve(), (path, name))
    return _named(list(found.values()))


def _expand(argument: str, suffixes: frozenset[str], what: str) -> Iterable[tuple[Path, Path]]:
    path = Path(argument)
    if path.is_dir():
        inside = [file for file in _walk(path) if file.suffix.lower() in suffixes]
        if not inside:
            usage_error(f"{argument}: this folder holds no {what} ({' '.join(sorted(suffixes))})")
        return [(file, file.relative_to(path)) for file in inside]
    if path.exists():
        return [(path, Path(path.name))]
    if glob.has_magic(argument):
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
        files = [match for match in matches if match.is_file()]
        if not files:
            usage_error(f"{argument}: no file matches this pattern")
        return [(file, Path(file.name)) for file in files]
    usage_error(f"{argument}: no such file or folder")


def _walk(folder: Path) -> list[Path]:
    """Files below a folder, sorted, hidden ones left out."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _named(files: list[tuple[Path, Path]]) -> list[Input]:
    """Drop the suffix from the names; keep it where two files differ in nothing else (``cat.jpg``, ``cat.png``)."""
    stems = Counter(name.with_suffix("") for _, name in files)
    inputs, taken = [], dict[str, Path]()
    for path, name in files:
        shared = stems[name.with_suffix("")] > 1
        chosen = str(name if shared else name.with_suffix(""))
        if chosen in taken:
            usage_error(
                f"{taken[chosen]} and {path} have one name, so their results would too; "
                "give the folder that holds both, or work on them in two goes"
            )
        taken[chosen] = path
        inputs.append(Input(path, chosen))
    if any(count > 1 for count in stems.values()):
        note("note: some inputs differ in their ending only; their results keep it in the name, as in cat.jpg.qlip")
    return inputs
