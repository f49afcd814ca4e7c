"""What was read as JSON: the schema's values, or one line that says what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from qlip import QLIPError, errors
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


def test_install_command__names_where_the_package_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(errors.__file__).parents[2]
    monkeypatch.chdir(root)
    assert errors.install_command("eval") == 'pip install -e ".[eval]"'
    monkeypatch.chdir(tmp_path)
    assert errors.install_command("eval") == f'pip install -e "{root}[eval]"'
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "qlip" / "errors.py"))
    for origin, address in {
        '{"url": "file:///x/qlip-0.2.0-py3-none-any.whl", "archive_info": {}}': "file:///x/qlip-0.2.0-py3-none-any.whl",
        '{"url": "https://x/qlip", "vcs_info": {"vcs": "git", "commit_id": "1"}}': "git+https://x/qlip",
    }.items():
        monkeypatch.setattr(errors.metadata.PathDistribution, "read_text", lambda self, name, origin=origin: origin)
        assert errors.install_command("eval") == f'pip install "qlip[eval] @ {address}"'
    monkeypatch.setattr(errors.metadata.PathDistribution, "read_text", lambda self, name: None)
    assert errors.install_command("eval") == 'pip install "qlip[eval]"'
