"""JSON that users give: lines of it, or a file that is one array or one object. Every stage reads it by these
functions.

Lines end with "\\n" alone ("\\r" before it is white space): U+2028, U+2029 and U+0085 may stand inside a
text, which `str.splitlines` would cut there. A byte-order mark is never text.
Integers may have any length, and NaN and Infinity are numbers, as Python writes them.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, BinaryIO, NamedTuple

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.text_encoding import encoding_by_mark, has_ascii, is_wide

MAX_WHOLE_CHARACTERS = 1 << 30
"""of a file that is one JSON value and not lines: it is held in memory"""


class NotJsonError(ValueError):
    """A text is not one JSON value; the message is the reason, without the place."""


class RepeatedNames(dict[str, Any]):
    """An object in which a name stands twice with different values; it has the last one, as with `json`."""

    repeated: frozenset[str] = frozenset()


class JsonRecord(NamedTuple):
    """A value of a file, and where it stands."""

    place: str
    """`line 3`, or `item 3` of an array"""
    number: int
    """from 1"""
    value: Any


def parse_json(text: str) -> Any:
    """The value of a JSON text. An integer that Python does not convert (4,300 digits) becomes a Decimal.

    Raises:
        NotJsonError: it is not one JSON value, or nested too deep.
    """
    try:
        try:
            return _DECODER.decode(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # Python's limit of digits: a rare case, so that the others stay fast
            return _DECODER_OF_LONG_INTEGERS.decode(text)
    except json.JSONDecodeError as error:
        raise NotJsonError(_reason(text, error)) from error
    except RecursionError as error:
        raise NotJsonError("its lists and objects are nested too deep") from error


def text_lines(stream: BinaryIO, *, name: str, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a text in UTF-8, or in UTF-16 or UTF-32 with a mark.

    Args:
        stream: at its start.
        name: how messages name the file.
        encoding: of lines that are not UTF-8, or of all where it is of another kind (see `decode_text`).

    Raises:
        UserError: bytes that are no text; names the line.
    """
    number = 0
    try:
        for number, line in enumerate(decoded_lines(stream, encoding), start=1):
            yield number, line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} line {number + 1} is not {error.encoding.upper()} ({error.reason}): convert"
            " it to UTF-8 (prepare_corpus reads other encodings by --encoding NAME), or mend that line"
        ) from error


def json_records(stream: BinaryIO, *, name: str, encoding: str = "utf-8") -> Iterator[JsonRecord]:
    """The values of JSON lines; else the items of the array, or the one value, that the file is.

    Raises:
        UserError: it is neither, or one value of more than MAX_WHOLE_CHARACTERS; names the place.
    """
    lines = text_lines(stream, name=name, encoding=encoding)
    is_first = True
    for number, line in lines:
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except NotJsonError as error:
            if not is_first or not line.lstrip().startswith(("[", "{")):
                raise _not_json(name, number, error) from error
            yield from _whole(number, line, lines, name, error)
            return
        if isinstance(value, list) and is_first:
            yield from _array_in_a_line(number, value, lines, name)
            return
        is_first = False
        yield JsonRecord(f"line {number}", number, value)


def _array_in_a_line(
    number: int, values: list[Any], lines: Iterator[tuple[int, str]], name: str
) -> Iterator[JsonRecord]:
    if any(line.strip() for _, line in lines):
        raise UserError(
            f"{name} line {number} is an array, and more lines follow: give one object a line, or one array"
            " in all"
        )
    yield from (JsonRecord(f"item {item}", item, value) for item, value in enumerate(values, start=1))


def _whole(
    number: int, first: str, rest: Iterator[tuple[int, str]], name: str, reason: NotJsonError
) -> Iterator[JsonRecord]:
    """The records of a file whose first line is not JSON: perhaps it is one value over many lines."""
    lines, num_characters = [first], len(first)
    for _, line in rest:
        if len(lines) == 1 and first.lstrip().startswith("{") and _is_object(line):
            # Objects on lines, of which the first is wrong; within one object none stands alone on a line.
            raise _not_json(name, number, reason)
        lines.append(line)
        num_characters += len(line)
        if num_characters > MAX_WHOLE_CHARACTERS:
            raise UserError(
                f"{name} line {number} is not JSON ({reason}), and a file that is one JSON value may have"
                f" {MAX_WHOLE_CHARACTERS:,} characters: mend that line, or make JSON lines of the file"
                " (jq -c '.[]')"
            )
    try:
        value = parse_json("\n".join(lines))
    except NotJsonError as error:
        raise UserError(
            f"{name} is neither JSON lines (line {number}: {reason}) nor one JSON value ({error}): write an"
            " object a line (jq -c . does), or mend it"
        ) from error
    values = value if isinstance(value, list) else [value]
    yield from (JsonRecord(f"item {item}", item, value) for item, value in enumerate(values, start=1))


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except NotJsonError:
        return False


def decoded_lines(stream: BinaryIO, encoding: str) -> Iterator[str]:
    """The lines with their ends, without a byte-order mark.

    Raises:
        UnicodeDecodeError: bytes that are no text.
    """
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)  # type: ignore[type-var]
    encoding = _encoding_of(buffered.peek(4), encoding)
    if not has_ascii(encoding):
        yield from io.TextIOWrapper(buffered, encoding=encoding, newline="\n")
        return
    first = buffered.readline().removeprefix(codecs.BOM_UTF8)
    if first:
        yield _decoded(first, encoding)
    for line in buffered:
        yield _decoded(line, encoding)


def _encoding_of(head: bytes, named: str) -> str:
    """The encoding of a file that begins so: as its mark says, else as it was named; but UTF-8 where that has
    a NUL byte in each character of ASCII, and there is none."""
    if marked := encoding_by_mark(head):
        return marked if marked != "utf-8" or not has_ascii(named) else named
    return "utf-8" if is_wide(named) and b"\0" not in head else named


def _decoded(line: bytes, encoding: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        if encoding == "utf-8":
            raise
        return line.decode(encoding)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    repeated = frozenset(name for name, value in pairs if values[name] != value)
    if not repeated:
        return values
    marked = RepeatedNames(values)
    marked.repeated = repeated
    return marked


def _integer(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:
        return Decimal(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_DECODER_OF_LONG_INTEGERS = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _reason(text: str, error: json.JSONDecodeError) -> str:
    if not text.strip("\0 \t\r\n"):
        return "it holds only zero bytes, as a crash of the writer leaves: lines are missing there"
    if "\0" in text:
        return f"{error.msg} at character {error.pos + 1}; it holds zero bytes, as UTF-16 without a mark has"
    at = "its end" if error.pos >= len(text.rstrip()) else f"character {error.pos + 1} of {len(text)}"
    return f"{error.msg} at {at}"


def _not_json(name: str, number: int, reason: NotJsonError) -> UserError:
    return UserError(f"{name} line {number} is not JSON ({reason}): mend it or leave the file out")
