"""Entropy coders of a model: one to write with, and others to read files that were coded with earlier tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from qlip.errors import QLIPError
from qlip.modeling.checkpoint import Files
from qlip.tokens.entropy.coder import TokenCodec
from qlip.tokens.entropy.tables import FILE, Tables

TAG_BYTES = 8
"""Length of the tag before the coded bytes of a `.qlip` file: the start of the SHA-256 of its tables."""


class TokenCodecs:
    """Entropy coders, found by the hash of their tables. Files are read on first use; threads may share it.

    Args:
        current: file of the tables to write with; None if there are none.
        earlier: files of tables to read with.
        name: name in errors of the model or file that the tables come from.
    """

    def __init__(self, current: Path | None, earlier: list[Path], name: str) -> None:
        self._current, self._name = current, name
        self._files = earlier if current is None else [current, *earlier]
        self._loaded: dict[Path, TokenCodec] = {}

    @classmethod
    def of_model(cls, name_or_path: str | Path, **hub: Any) -> Self:
        """Open a checkpoint's tables: `entropy_tables.safetensors`, and `entropy_tables-*.safetensors` to read with.

        Args:
            name_or_path: as for :meth:`qlip.QLIPModel.from_pretrained`.
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            QLIPError: no such checkpoint.
        """
        files = Files(name_or_path, **hub)
        return cls(files.path(FILE), sorted(files.folder.glob(FILE.replace(".", "-*."))), files.name)

    @classmethod
    def of_file(cls, path: str | Path) -> Self:
        """Open the tables of one file."""
        return cls(Path(path), [], str(path))

    @property
    def current(self) -> TokenCodec | None:
        """Entropy coder to write with; None if there are no tables.

        Raises:
            QLIPError: the tables cannot be read, or the package ``constriction`` is not installed.
        """
        return None if self._current is None else self._load(self._current)

    def find(self, tag: bytes) -> TokenCodec:
        """Return the entropy coder whose tables' SHA-256 begins with `tag`.

        Raises:
            QLIPError: there is none, or tables cannot be read.
        """
        for file in self._files:
            codec = self._load(file)
            if bytes.fromhex(codec.digest).startswith(tag):
                return codec
        here = ", ".join(codec.digest[: 2 * TAG_BYTES] for codec in self._loaded.values())
        raise QLIPError(
            f"entropy-coded with the tables {tag.hex()}, but {self._name} has {here or 'none'}; "
            f"give the model that coded it, or its {FILE}"
        )

    def _load(self, file: Path) -> TokenCodec:
        if file not in self._loaded:
            self._loaded[file] = TokenCodec(Tables.load(file))
        return self._loaded[file]
