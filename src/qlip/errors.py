"""The error for faults that the caller can fix: one line with the input, the fault and the remedy."""

from __future__ import annotations

import difflib
import importlib
import json
import operator
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

Schema = TypeVar("Schema", bound=BaseModel)


class QLIPError(ValueError):
    """A fault that the caller can fix. The message is one line; the command line prints it without a traceback."""


class QLIPWarning(UserWarning):
    """A fault that does not end the work. The message is one line; the command line prints it as such."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency; if it or what it needs is absent, the error names the extra that installs it.

    Args:
        module: dotted name of the module, as in ``import module``.
        extra: the extra of ``pip install "qlip[extra]"`` that installs it.

    Raises:
        QLIPError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).split(".")[0]
        raise QLIPError(f"this needs the package {package!r}: {install_command(extra)}") from None


def install_command(extra: str) -> str:
    """Return pip's command for an extra of this package, from the place where this package itself came from.

    Args:
        extra: the extra's name.
    """
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():  # run from a checkout, or installed from it with -e
        return f'pip install -e "{"." if Path.cwd() == checkout else checkout}[{extra}]"'
    with suppress(metadata.PackageNotFoundError, ValueError, KeyError):
        if origin := metadata.distribution("qlip").read_text("direct_url.json"):  # a wheel, a folder or a repository
            return f'pip install "qlip[{extra}] @ {_pip_address(json.loads(origin))}"'
    return f'pip install "qlip[{extra}]"'


def _pip_address(origin: dict[str, Any]) -> str:
    """Address for pip of what ``direct_url.json`` describes (PEP 610)."""
    system = origin.get("vcs_info", {}).get("vcs")
    return f"{system}+{origin['url']}" if system else str(origin["url"])


def check_integer(name: str, value: object, least: int = 1) -> int:
    """Return an integer argument as `int`, NumPy's too.

    Args:
        name: name of the argument, for the error.
        value: given.
        least: smallest value allowed.

    Raises:
        QLIPError: it is no integer, or smaller.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise QLIPError(f"{name} {value!r}: give an integer, {least} or more")
    return number


def nearest(name: str, names: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the most similar of ``names``, or "" if none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def validate(schema: type[Schema], values: object, where: str) -> Schema:
    """Check ``values`` against a pydantic schema; the error is one line with the first fault and the nearest name.

    Args:
        schema: a pydantic model class with ``extra="forbid"``.
        values: parsed content, normally a dict.
        where: name of the source (a file) in the error.

    Raises:
        QLIPError: an unknown key, a missing key, or a value of the wrong type or range.
    """
    try:
        found = schema.model_validate(values)
    except ValidationError as error:
        first, count = error.errors()[0], error.error_count()
    else:
        if place := _truth_as_number(values, found):
            raise QLIPError(f"{where}: {place}: must be a number, got true or false")
        return found
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(schema, first["loc"][:-1])
        what = f"unknown key {place!r}{nearest(str(first['loc'][-1]), known)}"
    elif first["type"] == "missing":
        what = f"key {place!r} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        what = f"{place}: {message}" if place else message
        if not isinstance(first["input"], dict) and first["type"] != "value_error":
            what += f", got {first['input']!r}"
    more = f" (and {count - 1} more)" if count > 1 else ""
    raise QLIPError(f"{where}: {what}{more}")


def _truth_as_number(raw: object, found: object, place: str = "") -> str | None:
    """Dotted key of the first true or false that pydantic took for 1 or 0; None if there is none."""
    if isinstance(raw, bool) and type(found) in (int, float):
        return place
    pairs: Iterable[tuple[Any, Any, Any]] = ()
    if isinstance(raw, dict):
        read = dict(found) if isinstance(found, BaseModel) else found if isinstance(found, dict) else {}
        pairs = [(key, value, read.get(key)) for key, value in raw.items()]
    elif isinstance(raw, list) and isinstance(found, list | tuple):
        pairs = zip(range(len(raw)), raw, found, strict=False)
    inner = (_truth_as_number(one, other, f"{place}.{key}".lstrip(".")) for key, one, other in pairs)
    return next(filter(None, inner), None)


def validate_json(schema: type[Schema], data: str | bytes, where: str, *, remedy: str, of: str = "") -> Schema:
    """Parse JSON and check it against a schema, as `validate` does.

    Args:
        schema: a pydantic model class; its field ``version``, if any, defaults to the newest version.
        data: JSON in UTF-8.
        where: name of the source (a file) in the error.
        remedy: remedy in the error for invalid JSON.
        of: name of the format in the error for a newer version.

    Raises:
        QLIPError: invalid JSON, a newer version, or values that do not fit.
    """
    try:
        values = json.loads(data)
    except ValueError:  # also for bytes that are not UTF-8
        raise QLIPError(f"{where}: not JSON; {remedy}") from None
    version = values.get("version") if isinstance(values, dict) else None
    if of and isinstance(version, int) and version > schema.model_fields["version"].default:
        raise QLIPError(f"{where}: version {version} of {of}; pip install -U qlip")
    return validate(schema, values, where)


def _fields_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names valid at a location inside nested schemas; empty if the location is outside of them."""
    current: list[type[BaseModel]] = [schema]
    for part in location:
        if isinstance(part, int):
            continue
        found: list[type[BaseModel]] = []
        for candidate in current:
            if part in candidate.model_fields:
                found += _schemas_in(candidate.model_fields[part].annotation)
            elif candidate.__name__ == part:  # pydantic names the member of the union that it tried
                found.append(candidate)
        current = found
    return [name for candidate in current for name in candidate.model_fields]


def _schemas_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for argument in get_args(annotation) for schema in _schemas_in(argument)]
