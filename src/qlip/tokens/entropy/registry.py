"""Entropy coders of a model: the current one, and those that read files coded with earlier tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from qlip.errors import QLIPError
from qlip.modeling.checkpoint import Files
from qlip.tokens.entropy.coder import TokenCodec
from qlip.tokens.entropy.tables import FILE, Tables

TAG_BYTES = 8
"""Bytes of the tables' SHA-256 that stand before the coded bytes of a `.qlip` file and name its tables."""


class TokenCodecs:
    """Coders by their tables' hash. Nothing is read before it is needed; threads may share it.

    Args:
        current: file of the tables to code with, if there are any.
        earlier: files of tables to read with.
        name: what errors call the place they come from.
    """

    def __init__(self, current: Path | None, earlier: list[Path], name: str) -> None:
        self._current, self._name = current, name
        self._files = earlier if current is None else [current, *earlier]
        self._loaded: dict[Path, TokenCodec] = {}

    @classmethod
    def of_model(cls, name_or_path: str | Path, **hub: Any) -> Self:
        """Coders of a checkpoint: `entropy_tables.safetensors`, and `entropy_tables-*.safetensors` for reading.

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
        """Coder with the tables of one file."""
        return cls(Path(path), [], str(path))

    @property
    def current(self) -> TokenCodec | None:
        """Coder to write with; None if there are no tables.

        Raises:
            QLIPError: tables that cannot be read, or the package ``constriction`` is not installed.
        """
        return None if self._current is None else self._load(self._current)

    def find(self, tag: bytes) -> TokenCodec:
        """Coder whose tables' SHA-256 begins with `tag`.

        Raises:
            QLIPError: none of them, or tables that cannot be read.
        """
        for file in self._files:
            codec = self._load(file)
            if bytes.fromhex(codec.digest).startswith(tag):
                return codec
        here = ", ".join(codec.digest[: 2 * TAG_BYTES] for codec in self._loaded.values())
        raise QLIPError(
            f"entropy-coded with the tables {tag.hex()}, and {self._name} has {here or 'none'}; "
            f"give the model that coded it, or its {FILE}"
        )

    def _load(self, file: Path) -> TokenCodec:
        if file not in self._loaded:
            self._loaded[file] = TokenCodec(Tables.load(file))
        return self._loaded[file]
