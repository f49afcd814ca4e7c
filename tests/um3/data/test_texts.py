"""Texts in Parquet tables, JSON Lines and plain text files; what is no text is named by its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlip import QLIPError
from qlip.um3.data.texts import Broken, read_texts
from tests.um3.data.made import jsonl


def read(pattern: Any, **options: Any) -> tuple[list[str], list[str]]:
    """Texts, and faults."""
    found = list(read_texts(str(pattern), **options))
    texts, broken = [one for one in found if isinstance(one, str)], [one for one in found if isinstance(one, Broken)]
    assert all(one.reason.startswith(one.where) for one in broken)
    return texts, [one.reason for one in broken]


def test_read_texts__of_json_lines(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        [{"text": "one\ntwo"}, "!{oops", {"text": " "}, {"text": 3}, [1], {}, {"text": "é"}]
        + [{"text": "half \ud800"}, "!" + "[" * 100_000],
    )
    texts, faults = read(path)
    assert texts == ["one\ntwo", "é"]
    assert faults == [
        f"{path}: line 2: not JSON",
        f"{path}: line 3: the text is empty",
        f"{path}: line 4: 'text' is a int, not a text",
        f"{path}: line 5: not an object with 'text'",
        f"{path}: line 6: has no 'text'",
        f"{path}: line 8: the text has half a surrogate pair",
        f"{path}: line 9: not JSON",
    ]


def test_read_texts__of_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one", None, "", "two"], "id": [1, 2, 3, 4]}), path, row_group_size=3)
    texts, faults = read(path, field="body")
    assert texts == ["one", "two"]
    assert faults == [f"{path}: row 1: has no 'body'", f"{path}: row 2: the text is empty"]
    with pytest.raises(QLIPError, match="no column 'text'; it has body, id"):
        read(path)


def test_read_texts__a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {number}" for number in range(1000)]}), path, row_group_size=500)
    data = bytearray(path.read_bytes())
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    begin = second.dictionary_page_offset or second.data_page_offset
    data[begin : begin + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(QLIPError, match=r"a.parquet: cannot be read after row 256 \(.*\); fetch the file again"):
        read(path)


def test_read_texts__of_plain_files(tmp_path: Path) -> None:
    for name, data in (("a", b"\xef\xbb\xbfone\ntwo\n"), ("b", b""), ("c", b"\xff\xfe"), ("d", b"three")):
        (tmp_path / f"{name}.txt").write_bytes(data)
    texts, faults = read(tmp_path / "*.txt")
    assert texts == ["one\ntwo\n", "three"]
    assert faults == [f"{tmp_path / 'b.txt'}: the text is empty", f"{tmp_path / 'c.txt'}: not UTF-8 text"]


def test_read_texts__files_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    for pattern, fault in (("no.txt", "No such file"), ("*.txt", "matches nothing"), ("a.csv", "names end with")):
        with pytest.raises(QLIPError, match=fault):
            read(tmp_path / pattern)
