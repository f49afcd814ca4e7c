"""Objects by name: ours as they are or imported when asked for, other packages' by entry point, else one line."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from qlip import QLIPError, registry
from qlip.registry import Registry


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> Registry[object]:
    added = [EntryPoint("blue", "math:tau", "colours"), EntryPoint("azure", "math:e", "colours")]
    added.append(EntryPoint("red", "no.such.module:x", "colours"))
    monkeypatch.setattr(registry, "entry_points", lambda group: tuple(one for one in added if one.group == group))
    return Registry("colour", {"red": 1, "green": "math:pi"}, group="colours")


def test_registry__own_names_come_first_and_are_not_replaced(colours: Registry[object]) -> None:
    assert list(colours) == ["red", "green", "azure", "blue"] and len(colours) == 4
    assert colours["red"] == 1 and "blue" in colours and "yellow" not in colours


def test_registry__imports_what_is_asked_for(colours: Registry[object]) -> None:
    assert (colours.find("green"), colours.find("blue")) == (pytest.approx(3.14159265), pytest.approx(6.2831853))
    lazy = Registry[object]("colour", {"red": "no.such.module:x"})
    assert "red" in lazy
    with pytest.raises(ModuleNotFoundError):
        lazy["red"]


def test_registry__an_unknown_name_is_one_line_with_the_nearest(colours: Registry[object]) -> None:
    with pytest.raises(QLIPError, match=r"^gren: no such colour \(did you mean 'green'\?\); there are red, green, azu"):
        colours.find("gren")
    with pytest.raises(KeyError):
        colours["gren"]
    assert colours.get("gren") is None
