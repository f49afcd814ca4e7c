"""Input files named by arguments (files, folders, patterns), and the names of their results."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlip.cli.console import note, usage_error
from qlip.files import BESIDE, IMAGE_SUFFIXES, files_under, suffixes_of

IMAGES = frozenset(f".{suffix}" for suffix in IMAGE_SUFFIXES)
"""Suffixes of images in folders; a file that is named itself may have any suffix."""

TOKEN_SUFFIXES = frozenset({".qlip"})


@dataclass(frozen=True)
class Input:
    """One input file.

    Attributes:
        path: its path.
        name: unique name of its results, without suffix; it includes the subfolders of a folder that was given.
    """

    path: Path
    name: str

    def output(self, folder: Path, suffix: str) -> Path:
        """Return the path of its result."""
        return folder / f"{self.name}{suffix}"


def find(arguments: Sequence[str], suffixes: frozenset[str], noun: str) -> list[Input]:
    """Return `paths`, each file once, with the names of their results.

    Args:
        arguments: files, folders (searched with their subfolders), or glob patterns that the shell did not expand.
        suffixes: suffixes of the files that are taken from a folder.
        noun: "image" or ".qlip file", for messages.

    Raises:
        UsageError: no file was found, or the results of two inputs would have the same name.
    """
    found: dict[str, tuple[Path, Path]] = {}  # absolute path -> (path, name with suffix)
    for argument in arguments:
        for path, name in _expand(argument, suffixes, noun):
            found.setdefault(os.path.abspath(path), (path, name))
    return _named(list(found.values()))


def paths(arguments: Sequence[str], suffixes: frozenset[str], noun: str) -> list[Path]:
    """Return the files that the arguments name, in their order, folders and patterns sorted; arguments as for `find`.

    Raises:
        UsageError: no file was found.
    """
    return [path for argument in arguments for path, _ in _expand(argument, suffixes, noun)]


def _expand(argument: str, suffixes: frozenset[str], noun: str) -> Iterable[tuple[Path, Path]]:
    if not argument:
        usage_error(f"an {noun} without a name; give a file, a folder or a pattern")
    path = Path(argument)
    if path.is_dir():
        files = sorted(Path(name) for name in files_under(path))
        inside = [file for file in files if file.suffix.lower() in suffixes]
        if not inside:
            usage_error(f"{argument}: this folder holds no {noun} ({' '.join(sorted(suffixes))})")
        left_out = [file.name for file in files if file.suffix.lower() not in (*suffixes, *BESIDE)]
        if left_out:
            wanted = " ".join(sorted(suffixes))
            note(f"note: {argument}: {suffixes_of(left_out)} left out; the names of {noun}s end in {wanted}")
        return [(path / file, file) for file in inside]
    if path.exists():
        return [(path, Path(path.name))]
    if glob.has_magic(argument):
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
        files = [match for match in matches if match.is_file()]
        if not files:
            usage_error(f"{argument}: no file matches this pattern")
        return [(file, Path(file.name)) for file in files]
    usage_error(f"{argument}: no such file or folder")


def _named(files: list[tuple[Path, Path]]) -> list[Input]:
    """Drop the suffix from the names, unless two files differ only in it (``cat.jpg``, ``cat.png``)."""
    stems = Counter(name.with_suffix("") for _, name in files)
    inputs, taken = [], dict[str, Path]()
    for path, name in files:
        shared = stems[name.with_suffix("")] > 1
        chosen = str(name if shared else name.with_suffix(""))
        if chosen in taken:
            usage_error(
                f"{taken[chosen]} and {path} have the same name, so their results would too; "
                "give the folder that holds both, or run the command once for each"
            )
        taken[chosen] = path
        inputs.append(Input(path, chosen))
    if any(count > 1 for count in stems.values()):
        note("note: some inputs differ only in their suffix; their results keep it in the name, as in cat.jpg.qlip")
    return inputs
