"""The one error a person meets: a line that names the input, what was wrong with it, and what would be right."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError

Schema = TypeVar("Schema", bound=BaseModel)


class QLIPError(ValueError):
    """Something the caller can put right. The message is one line; the command line prints it without a traceback."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra of the package brings it.

    Args:
        module: dotted name of the module, as in ``import module``.
        extra: the extra of ``pip install "qlip[extra]"`` that installs it.

    Raises:
        QLIPError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # the module is there; something it needs is not, and that is another story
        raise QLIPError(f'this needs the package {module.split(".")[0]!r}: pip install "qlip[{extra}]"') from None


def nearest(name: str, names: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the most similar of ``names``, or nothing when none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def validate(schema: type[Schema], values: object, where: str) -> Schema:
    """Check ``values`` against a pydantic schema; the first fault becomes one line with the nearest right name.

    Args:
        schema: a pydantic model class with ``extra="forbid"``.
        values: what was read, normally a dict.
        where: the file or object the values came from, named in the error.

    Raises:
        QLIPError: an unknown key, a missing key, or a value of the wrong type or range.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first, count = error.errors()[0], error.error_count()
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


def validate_json(schema: type[Schema], data: str | bytes, where: str, *, remedy: str, of: str = "") -> Schema:
    """Read JSON that a schema describes, as `validate` does.

    Args:
        schema: a pydantic model class; its field ``version``, if any, defaults to the newest version.
        data: UTF-8.
        where: the file that it came from.
        remedy: what to do where it is no JSON.
        of: what a newer version is a version of; named in the error.

    Raises:
        QLIPError: no JSON, a newer version, or values that do not fit.
    """
    try:
        values = json.loads(data)
    except ValueError:  # bytes that are no text, too
        raise QLIPError(f"{where}: not JSON; {remedy}") from None
    version = values.get("version") if isinstance(values, dict) else None
    if of and isinstance(version, int) and version > schema.model_fields["version"].default:
        raise QLIPError(f"{where}: version {version} of {of}; pip install -U qlip")
    return validate(schema, values, where)


def _fields_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names valid at a location inside nested schemas; empty where the location leaves them."""
    current: list[type[BaseModel]] = [schema]
    for part in location:
        if isinstance(part, int):
            continue
        found: list[type[BaseModel]] = []
        for candidate in current:
            if part in candidate.model_fields:
                found += _schemas_in(candidate.model_fields[part].annotation)
            elif candidate.__name__ == part:  # pydantic names the member of a union it tried
                found.append(candidate)
        current = found
    return [name for candidate in current for name in candidate.model_fields]


def _schemas_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for argument in get_args(annotation) for schema in _schemas_in(argument)]
