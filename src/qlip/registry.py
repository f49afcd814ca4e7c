"""Objects by name: ours, and those that installed packages add through an entry point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from qlip.errors import QLIPError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A read-only mapping from names to objects, ours first and in their order.

    Args:
        kind: noun for one of the objects in errors, such as "evaluator".
        items: an object per name, or where to import it from, ``"package.module:attribute"``, which happens when it
            is asked for.
        group: entry point group whose members are added under their names; a name of ours is not replaced.
    """

    def __init__(self, kind: str, items: Mapping[str, T | str], group: str | None = None) -> None:
        self.kind, self._items, self._group = kind, dict(items), group

    def find(self, name: str) -> T:
        """The object of a name. Raises QLIPError, with the nearest name, if there is none."""
        if name not in self:
            raise unknown_name(name, self.kind, self)
        return self[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            return self._added()[name].load()  # type: ignore[no-any-return]
        item = self._items[name]
        return EntryPoint(name, item, "").load() if isinstance(item, str) else item

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._added()

    def __iter__(self) -> Iterator[str]:
        return iter({**self._items, **self._added()})

    def __len__(self) -> int:
        return len({**self._items, **self._added()})

    def _added(self) -> dict[str, EntryPoint]:
        points = () if self._group is None else entry_points(group=self._group)
        by_name = {point.name: point for point in points if point.name not in self._items}
        return dict(sorted(by_name.items()))


def unknown_name(name: str, kind: str, names: Iterable[str]) -> QLIPError:
    """The error for a name that is none of `names`: says the nearest one, and all."""
    known = list(names)
    return QLIPError(f"{name}: no such {kind}{nearest(name, known)}; there are {', '.join(known)}")
