"""Entropy coders of a model, found by the hash of their tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip.errors import QLIPError
from qlip.tokens import TokenCodecs
from tests.tokens.samples import entropy_tables


def test_token_codecs__coders_are_found_by_their_tables_hash(tmp_path: Path) -> None:
    now, before = entropy_tables(7, seed=1), entropy_tables(7, seed=2)
    now.save(tmp_path / "entropy_tables.safetensors")
    before.save(tmp_path / "entropy_tables-2025.safetensors")
    codecs = TokenCodecs.of_model(tmp_path)
    assert codecs.current is not None and codecs.current.digest == now.digest
    assert codecs.find(bytes.fromhex(before.digest)[:8]).digest == before.digest
    with pytest.raises(QLIPError, match=f"tables {'00' * 8}, but .* has {now.digest[:16]}, {before.digest[:16]}; give"):
        codecs.find(bytes(8))
    (tmp_path / "entropy_tables.safetensors").unlink()
    assert TokenCodecs.of_model(tmp_path).current is None
    assert TokenCodecs.of_file(tmp_path / "entropy_tables-2025.safetensors").current is not None
