"""What was read as JSON: the schema's values, or one line that says what is wrong and what to do."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from qlip import QLIPError
from qlip.errors import validate_json


class Note(BaseModel):
    """A file of version 2."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[2] = 2
    text: str


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": ', "note.json: not JSON; write it again"),
        (b"\xff\xfe{}", "note.json: not JSON; write it again"),
        ('{"version": 3, "text": 5}', "note.json: version 3 of notes; pip install -U qlip"),
        ('{"version": 1, "text": "x"}', r"note.json: version: .*, got 1"),
        ("[]", "note.json: Input should be a valid dictionary"),
        ('{"txt": "x", "text": "x"}', "note.json: unknown key 'txt' .did you mean 'text'"),
    ],
)
def test_validate_json__faults_are_one_line(data: str | bytes, message: str) -> None:
    with pytest.raises(QLIPError, match=f"^{message}") as raised:
        validate_json(Note, data, "note.json", remedy="write it again", of="notes")
    assert "\n" not in str(raised.value)


def test_validate_json__valid_values_are_read() -> None:
    assert validate_json(Note, b'{"text": "x"}', "note.json", remedy="", of="notes") == Note(text="x")
