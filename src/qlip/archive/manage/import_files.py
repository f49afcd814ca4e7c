"""Make a token dataset of .qlip files that exist already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from qlip.archive.dataset.layout import Layout, SkippedImage
from qlip.archive.dataset.schema import DatasetInfo, Views, arrow_schema
from qlip.archive.manage.merge import BuildResult, begin_dataset, finish_dataset
from qlip.data.sources.base import Annotation, read_json, read_text
from qlip.errors import QLIPError, require
from qlip.runtime.progress import OnProgress, no_progress
from qlip.tokens import ImageCodec, TokenFile
from qlip.tokens.entropy.registry import TokenCodecs
from qlip.tokens.token_file import check_model

FILES_PER_PART = 4096
SUFFIX = ".qlip"


def import_files(
    folder: Path,
    output: Layout,
    codec: ImageCodec,
    *,
    files_per_part: int = FILES_PER_PART,
    on_progress: OnProgress = no_progress,
) -> BuildResult:
    """Make a dataset of all .qlip files below a folder, in the order of their names; a later call resumes.

    A file's key is its path in the folder without the suffix. Captions and label come from the .json file beside it
    (fields ``captions`` and ``label``, as `qlip tokens export` writes them), else a caption from the .txt file. A file
    that is damaged, made of tiles or made by another model is a skipped image.

    Args:
        folder: of the files.
        output: of the dataset.
        codec: the model that made the files.
        files_per_part: files per part.
        on_progress: called with the files of each part, once when they are surveyed and once when they are written.

    Raises:
        QLIPError: no file that the model made, or the output holds something else.
    """
    arrow = require("pyarrow", extra="tables")
    paths = sorted((path for path in folder.rglob(f"*{SUFFIX}") if path.is_file()), key=lambda path: path.as_posix())
    if not paths:
        raise QLIPError(f"{folder}: no {SUFFIX} file in it")
    chunks = [paths[start : start + files_per_part] for start in range(0, len(paths), files_per_part)]
    coders, digest = codec.coders(), hashlib.sha256()
    grids, preparations = set[tuple[int, int]](), set[str | None]()
    for chunk in chunks:
        for path, found in _read(chunk, folder, codec, coders):
            if isinstance(found, TokenFile):
                grids.add(found.grid)
                preparations.add(found.preparation)
                digest.update(hashlib.sha256(found.bits).digest())
            digest.update(f"{_key(path, folder)}\n".encode(errors="surrogateescape"))
        on_progress(len(chunk))
    if not grids:
        reason = next(
            found.reason for _, found in _read(chunks[0], folder, codec, coders) if isinstance(found, SkippedImage)
        )
        raise QLIPError(f"{folder}: none of its {len(paths):,} files can be taken, the first: {reason}")
    info = DatasetInfo(
        model=codec.name,
        code_fingerprint=codec.model.code_fingerprint,
        decoder_fingerprint=codec.model.decoder_fingerprint,
        bits_per_token=codec.model.num_bits,
        group_size=codec.model.group_size,
        grid=next(iter(grids)) if len(grids) == 1 else None,
        views=Views(fit="square" if len(grids) == 1 else "keep-aspect"),
        preparation=next(iter(preparations)) if len(preparations) == 1 else None,
        batch_size=1,
    )
    begin_dataset(output, info, {"import": str(folder), "sha256": digest.hexdigest()}, None)
    done = output.finished()
    for part, chunk in enumerate(chunks):
        if part not in done:
            pairs = list(_read(chunk, folder, codec, coders))
            rows = [_row(path, folder, found) for path, found in pairs if isinstance(found, TokenFile)]
            errors = [found for _, found in pairs if isinstance(found, SkippedImage)]
            table = arrow.Table.from_pylist(rows, schema=arrow_schema(info))
            first = part * files_per_part
            name = f"files {first} to {first + len(chunk) - 1}"
            output.write_part(info, part, name, len(chunk), table, errors)
        on_progress(len(chunk))
    return BuildResult(finish_dataset(output, info), len(chunks))


def _read(
    paths: Sequence[Path], folder: Path, codec: ImageCodec, coders: TokenCodecs
) -> Iterator[tuple[Path, TokenFile | SkippedImage]]:
    for path in paths:
        key = _key(path, folder)
        try:
            file = TokenFile.from_bytes(path.read_bytes(), key, coders)
            check_model(file, codec.name, codec.model.code_fingerprint, codec.model.decoder_fingerprint)
            if file.tiles != (1, 1):
                raise QLIPError("made of tiles; tokenise its image instead")
            yield path, file
        except (QLIPError, OSError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split()).removeprefix(key).lstrip(": ")
            yield path, SkippedImage(key=key, reason=reason)


def _key(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix().removesuffix(SUFFIX)
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _row(path: Path, folder: Path, file: TokenFile) -> dict[str, object]:
    beside = _annotation(path)
    return {
        "key": _key(path, folder),
        "view": 0,
        "tokens": file.bits,
        "grid": list(file.grid),
        "original_size": list(file.original_size),
        "captions": list(beside.captions),
        "label": beside.label,
    }


def _annotation(path: Path) -> Annotation:
    """Return captions and label of the files beside; none if they cannot be read."""
    with suppress(OSError):
        if (record := path.with_suffix(".json")).is_file():
            return read_json(record.read_bytes(), record.name, None)
        if (text := path.with_suffix(".txt")).is_file():
            return read_text(text.read_bytes(), text.name)
    return Annotation()
