"""A result: metrics and everything they depend on, as one JSON file that can be verified."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricValue
from qlip.files import json_values, write_text

VERSION = 1
RENAMED = {f"{kind}_vgg16": f"{kind}_vgg16_relu5" for kind in ("precision", "recall")}
"""Metrics of version 0.1 that have another name now."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class EvalResult(_Strict):
    """One evaluator on one set.

    Attributes:
        evaluator: its name.
        options: it was made with, other than its defaults.
        settings: all that its metrics depend on, as it says itself.
        title: what a table calls this row, e.g. ``large photographs``.
        data: set and split, or a path.
        count: images that were measured.
        limit: number of images at most, where the set was not taken whole.
        drawn: they were drawn at random; False, as in version 0.1, if they are the first ones.
        broken: (key, reason) of images that could not be read; they are not counted.
        preparation: size, filter and crop in words.
        as_shipped: the preparation is the checkpoint's own.
        digest: SHA-256 (hex) over the keys and files of all images, in order.
        values: metrics by name.
        notes: what to keep in mind, by name.
        tables: longer ones: name -> records.
    """

    evaluator: str
    options: dict[str, Any] = {}
    settings: dict[str, Any]
    title: str
    data: str
    count: int
    limit: int | None
    drawn: bool = False
    broken: list[tuple[str, str]]
    preparation: str
    as_shipped: bool
    digest: str
    values: dict[str, MetricValue]
    notes: dict[str, str] = {}
    tables: dict[str, list[dict[str, Any]]] = {}

    @field_validator("options", "settings")
    @classmethod
    def _without_training(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Drop the training sources that older results have among options and settings of zero_shot."""
        if info.data.get("evaluator") != "zero_shot":
            return settings
        return {name: value for name, value in settings.items() if name != "trained"}

    @field_validator("values", "notes", mode="before")
    @classmethod
    def _with_new_names(cls, found: Any) -> Any:
        return {RENAMED.get(name, name): one for name, one in found.items()} if isinstance(found, dict) else found

    @property
    def prepared(self) -> str:
        """The preparation, and whether it is not the checkpoint's own."""
        return self.preparation if self.as_shipped else f"{self.preparation}, not the checkpoint's own"

    def full_name(self, value: str) -> str:
        """A metric's name with all that it depends on: what may be compared has equal ones.

        E.g. ``reconstruction/psnr@cifar10:test[n=10000, 64x64, bicubic, centre crop]``.
        """
        return f"{self.evaluator}/{value}@{self.data}[n={self.count}, {self.prepared}]"


class Result(_Strict):
    """The outcome of one ``qlip eval``.

    Attributes:
        version: of this layout.
        subject: name, kind, fingerprint, dtype and device of what was measured.
        measured: a row per evaluator and dataset.
        command, time: of the run.
        packages: versions.
        machine: what it ran on.
        seed: of the bootstrap and of other random draws.
        complete: False where the run was stopped before its last row.
        intervals: rules of 95% intervals: 1, as in version 0.1, bootstrap percentiles; 2, those of
            :mod:`qlip.evaluation.metrics.intervals`.
    """

    version: Literal[1] = 1
    subject: dict[str, str]
    measured: list[EvalResult]
    command: str
    time: str
    packages: dict[str, str | None]
    machine: str
    seed: int = 0
    complete: bool = True
    intervals: Literal[1, 2] = 2

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        values = json_values(self.model_dump(mode="json"))
        write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read one.

        Args:
            path: of the file, or the folder that holds it as ``result.json``.

        Raises:
            QLIPError: no such file, no result, or of a later version.
        """
        path = path / "result.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no JSON"
            raise QLIPError(f"{path}: {reason}; give a file that qlip eval --output wrote") from None
        if isinstance(found, dict) and found.get("version", VERSION) != VERSION:
            raise QLIPError(f"{path}: version {found['version']} of results, this qlip reads {VERSION}; update qlip")
        if isinstance(found, dict):
            found.setdefault("intervals", 1)
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise QLIPError(f"{path}: no result of qlip eval ({where}: {first['msg']})") from None


class Difference(_Strict):
    """A metric that was not reproduced: its full name, the old and the new value."""

    name: str
    was: float | str
    now: float | str


def differences(first: Result, second: Result, tolerance: float = 1e-6) -> list[Difference]:
    """List the differences between a result and its repetition.

    Counts, digests, settings, fingerprints and keys of broken images must be equal; metrics, their intervals and
    numbers in tables may differ by ``tolerance`` relative to the larger of 1 and their size. Intervals of results with
    other rules (`Result.intervals`) are not compared.

    Args:
        first, second: rows are matched by evaluator, set and title.
    """
    found: list[Difference] = []

    def add(name: str, was: Any, now: Any) -> None:
        if not _equal(was, now, tolerance):
            was, now = (one if isinstance(one, float | str) else str(one) for one in (was, now))
            found.append(Difference(name=name, was=was, now=now))

    add("the model's fingerprint", *(one.subject.get("fingerprint", "none") for one in (first, second)))
    again = {_identity(one): one for one in second.measured}
    for one in first.measured:
        where, other = f"{one.evaluator} on {one.data}", again.get(_identity(one))
        if other is None:
            add(where, "measured", "not measured")
            continue
        for field in ("count", "digest", "preparation", "settings"):
            add(f"{where}: {field}", getattr(one, field), getattr(other, field))
        add(f"{where}: broken images", *(sorted(key for key, _ in each.broken) for each in (one, other)))
        for name, metric in one.values.items():
            if (now := other.values.get(name)) is None:
                add(one.full_name(name), metric.value, "not measured")
                continue
            if not _equal(metric.value, now.value, tolerance):
                add(one.full_name(name), metric.value, now.value)
            elif first.intervals == second.intervals:
                add(f"{one.full_name(name)}: interval", [metric.low, metric.high], [now.low, now.high])
        was_tables, now_tables = (json_values(each.model_dump(mode="json"))["tables"] for each in (one, other))
        for name, table in was_tables.items():
            _add_table(add, f"{where}: table {name}", table, now_tables.get(name))
    return found


def _add_table(add: Callable[[str, Any, Any], None], name: str, was: list[Any], now: list[Any] | None) -> None:
    """Add a table's missing records, and each record that differs."""
    if now is None or len(was) != len(now):
        add(name, f"{len(was)} rows", "not measured" if now is None else f"{len(now)} rows")
        return
    for number, (first, second) in enumerate(zip(was, now, strict=True), 1):
        add(f"{name}, row {number}", first, {key: second.get(key) for key in first})


def _identity(one: EvalResult) -> tuple[str, str, str]:
    return one.evaluator, one.data, one.title


def _equal(was: Any, now: Any, tolerance: float) -> bool:
    """Compare nested JSON; numbers within the tolerance, infinite ones exactly."""
    if isinstance(was, dict) and isinstance(now, dict):
        return was.keys() == now.keys() and all(_equal(was[key], now[key], tolerance) for key in was)
    if isinstance(was, list | tuple) and isinstance(now, list | tuple):
        return len(was) == len(now) and all(_equal(*pair, tolerance) for pair in zip(was, now, strict=True))
    if isinstance(was, float) and isinstance(now, float) and math.isfinite(was) and math.isfinite(now):
        return abs(was - now) <= tolerance * max(1.0, abs(was), abs(now))
    return bool(was == now)
