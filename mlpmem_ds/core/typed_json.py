"""Frozen dataclasses as JSON objects, and back; unknown or missing keys and other types are refused.

A field is a key of the same name; `json_key("lambda")` gives it another key. Types that may stand in a field:
`str`, `int`, `float` (an integer is one too), `bool`, `Any`, `Literal[…]`, another such dataclass,
`X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `Mapping[str, X]`. A field of `added_later()` may have no key.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from mlpmem_ds.core.errors import DamagedDataError

Record = TypeVar("Record")
_KEY, _LATER = "json_key", "added_later"


def json_key(key: str) -> dict[str, str]:
    """Metadata of a field that has another name in JSON: `field(metadata=json_key("lambda"))`."""
    return {_KEY: key}


def added_later() -> dict[str, bool]:
    """Metadata of a field that files of before it do not have: it is read as its default."""
    return {_LATER: True}


def to_json(value: Any) -> Any:
    """A dataclass as plain JSON values; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_key_of(field): to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[Record], value: Any, *, where: str, version: int) -> Record:
    """A dataclass of this kind from what `to_json` made of one.

    Args:
        where: names the file in messages.
        version: of the format that this program reads, for messages.

    Raises:
        DamagedDataError: an unknown or missing key, or a value of another type; the message names it.
    """
    try:
        record: Record = _read(kind, value, "")
    except _Mismatch as error:
        raise DamagedDataError(
            f"{where}: {error}; this program reads version {version}: use the release that wrote it, or"
            " remake it"
        ) from error
    return record


class _Mismatch(Exception):
    """A value does not have the type of its place."""


def _key_of(field: dataclasses.Field[Any]) -> str:
    key: str = field.metadata.get(_KEY, field.name)
    return key


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _read_record(hint, value, place)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _read(inner, value, place)
    if origin is typing.Literal:
        _require(value in arguments, place, f"one of {', '.join(map(str, arguments))}", value)
        return value
    if origin is tuple:
        return _read_tuple(arguments, value, place)
    if origin is not None:  # Mapping[str, X], dict[str, X]
        _require(isinstance(value, dict), place, "an object", value)
        return {key: _read(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if hint is float:
        _require(isinstance(value, int | float) and not isinstance(value, bool), place, "a number", value)
        return value
    _require(type(value) is hint, place, hint.__name__, value)
    return value


def _read_record(kind: Any, value: Any, place: str) -> Any:
    _require(isinstance(value, dict), place, "an object", value)
    fields = {_key_of(field): field.name for field in dataclasses.fields(kind)}
    inside = f" in {place.lstrip('.')}" if place else ""
    if unknown := sorted(value.keys() - fields.keys()):
        raise _Mismatch(f"unknown key {unknown[0]}{inside}")
    later = {_key_of(field) for field in dataclasses.fields(kind) if field.metadata.get(_LATER)}
    if missing := sorted(fields.keys() - value.keys() - later):
        raise _Mismatch(f"key {missing[0]} is missing{inside}")
    hints = _hints(kind)
    values = {
        name: _read(hints[name], value[key], f"{place}.{key}") for key, name in fields.items() if key in value
    }
    try:
        return kind(**values)
    except ValueError as error:  # the record's own checks
        raise _Mismatch(f"{place.lstrip('.') or 'the file'} is refused ({error})") from error


def _read_tuple(hints: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    _require(isinstance(value, list), place, "a list", value)
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(value)
    _require(len(value) == len(hints), place, f"a list of {len(hints)}", value)
    return tuple(
        _read(hint, item, f"{place}[{number}]")
        for number, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _require(is_right: bool, place: str, expected: str, value: Any) -> None:
    if not is_right:
        raise _Mismatch(f"{place.lstrip('.') or 'the file'} is {str(value)[:40]!r}, not {expected}")
