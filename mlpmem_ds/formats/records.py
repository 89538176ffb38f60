"""A document as a file of many documents holds it: an object or a row with a text, and perhaps a group.

A field is named as it is spelled, else by a path of names with dots: `doc.text` is the field `doc.text`, or
`text` of the object in `doc`.

A reader is a function of a path and the rules. It yields a `Record` for each document, and an `Omission`
(omissions.py) in the place of what it does not read.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.names import printable
from mlpmem_ds.formats.json_lines import RepeatedNames
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.text_encoding import decode_text

_MAX_NAMES = 30  # in a message


@dataclass(frozen=True, kw_only=True)
class Record:
    """One document as a file holds it: `key` names it within the file; `group` is None where the file does
    not say."""

    key: str
    text: str
    group: str | None


@dataclass(frozen=True, kw_only=True)
class ReadRules:
    """How files become documents: the fields of a record with its text and its group, and the encoding of
    text that is not UTF-8. `chats`: records are conversations (chats.py), and there are no texts. `piece`:
    longer texts become pieces of so many characters at most; None: they stay whole. `first_piece_only`: only
    the first of a text counts."""

    text_field: str = "text"
    group_field: str | None = None
    encoding: str = "utf-8"
    chats: bool = False
    piece: int | None = None
    first_piece_only: bool = False

    def decode(self, content: bytes) -> str:
        """The text of a whole file; see `decode_text`."""
        return decode_text(content, self.encoding)


Reader = Callable[[Path, ReadRules], Iterator[Record | Omission]]


class RepeatedFieldError(ValueError):
    """A JSON object has a field twice, with different values; the message is the field's name."""


def record_of(
    path: Path, place: str, key: str, values: Any, text_field: str, group_field: str | None
) -> Record | Omission:
    """The record of an object with the requested fields; an omission where its text is null.

    Args:
        path, place: of the object, for messages.
        key: the record's name within its file.
        values: the object.
        text_field, group_field: the fields' names; a record need not have a group.

    Raises:
        UserError: it is no object, lacks a field, or has one twice; names the place.
    """
    if not isinstance(values, Mapping):
        raise UserError(
            f"{path} {place} is not an object with the field {text_field} (it is no object): mend it or"
            " leave the file out"
        )
    try:
        text = field_of(values, text_field)
        group = None if group_field is None else _group_of(values, group_field, path)
    except KeyError as error:
        raise UserError(
            f"{path} {place} is not an object with the fields"
            f" {', '.join(filter(None, (text_field, group_field)))} (it has {listed(values)}):"
            " name them with --text-field and --group-field"
        ) from error
    except RepeatedFieldError as error:
        raise UserError(
            f"{path} {place}: its {error} stands there more than once with different values: mend it"
        ) from error
    return make_record(path, place, key, text, group, text_field, group_field)


def make_record(
    path: Path, place: str, key: str, text: Any, group: Any, text_field: str, group_field: str | None
) -> Record | Omission:
    """The record of a text and a group as they were stored; an omission where the text is null.

    Raises:
        UserError: it is no text, or no group; names the place.
    """
    try:
        if (written := text_of(text)) is None:
            return Omission(name=key, reason="empty")
    except UnicodeError as error:
        raise UserError(
            f"{path} {place}: its {text_field} is not UTF-8 text ({error}): mend that record"
        ) from error
    except TypeError as error:
        raise UserError(
            f"{path} {place}: its {text_field} is {error}, not text: choose another --text-field"
        ) from error
    try:
        return Record(key=key, text=written, group=group_name(group))
    except (UnicodeError, TypeError) as error:
        raise UserError(
            f"{path} {place}: its {group_field} is no name of a group ({error}): choose another --group-field"
        ) from error


def field_of(values: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or of a path of names with dots; a path through null is null.

    Raises:
        KeyError: there is none.
        RepeatedFieldError: there are several.
    """
    if name in values:
        if isinstance(values, RepeatedNames) and name in values.repeated:
            raise RepeatedFieldError(name)
        return values[name]
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        outer = values.get(".".join(parts[:length]), name)
        if outer is None:
            return None
        if isinstance(outer, Mapping):
            try:
                return field_of(outer, ".".join(parts[length:]))
            except KeyError:
                continue
    raise KeyError(name)


def _group_of(values: Mapping[str, Any], group_field: str, path: Path) -> Any:
    try:
        return field_of(values, group_field)
    except KeyError:
        return partition_of(path, group_field)


def partition_of(path: Path, name: str) -> str | None:
    """The value that a folder `NAME=VALUE` above a file gives to all of its rows, as Hive and Spark lay out
    tables.

    Raises:
        KeyError: no folder has that name.
    """
    for folder in reversed(path.parent.parts):
        key, equals, value = folder.partition("=")
        if equals and urllib.parse.unquote(key) == name:
            return None if value == "__HIVE_DEFAULT_PARTITION__" else urllib.parse.unquote(value)
    raise KeyError(name)


def text_of(value: Any) -> str | None:
    """A stored text: a string, bytes in UTF-8, or a list of these, whose parts stand on lines of their own.

    Raises:
        UnicodeError: it cannot be read or written as UTF-8.
        TypeError: it is no text; its message is the kind.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        parts = [_text_of_one(part) for part in value]
        written = [part for part in parts if part is not None]
        return None if parts and not written else "\n".join(written)
    return _text_of_one(value)


def _text_of_one(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    value.encode()  # a lone surrogate is no text
    return value


def group_name(value: Any) -> str | None:
    """A stored group as text; None where there is none.

    Raises:
        UnicodeError, TypeError: it has no name.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple, Mapping)):
        raise TypeError(f"it is {type(value).__name__}")
    name = value.decode("utf-8") if isinstance(value, bytes) else str(value)
    name.encode()
    return name


def listed(names: Any) -> str:
    """Names for a message, in one line: the first of many."""
    shown = [printable(str(name)) for name in names]
    rest = len(shown) - _MAX_NAMES
    return ", ".join(shown[:_MAX_NAMES]) + (f" and {rest:,} more" if rest > 0 else "") or "none"
