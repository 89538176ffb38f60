"""Bytes as text: byte-order marks, UTF-8, or an encoding that the user named."""

from __future__ import annotations

import codecs
from functools import cache

_MARKS = (  # the longer ones first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MARK = "\ufeff"
"""the byte-order mark as a character; it is no text at the start of one"""
_ASCII = bytes(range(128)) + rb"\n \u0041 +AGE- ~{" + b"\x1b$B0!\x1b(B \x1b$)C \x0e0!\x0f"
"""ASCII, and what encodings of seven bits make other characters of"""
_MAX_NULS = 10  # of a text, one character in so many


class NotTextError(ValueError):
    """Bytes that are not text in the encoding; says why."""


def decode_text(content: bytes, encoding: str = "utf-8") -> str:
    """The text of a whole file, without byte-order marks, line ends as Python reads them.

    A mark says the encoding (UTF-8, UTF-16, UTF-32). Without one, what is whole UTF-8 is UTF-8, also
    where another encoding was named, if that one has ASCII as its first half, or is UTF-16 or UTF-32 and the
    text has no NUL byte (a few Chinese characters without a line end may be both: give them a mark).
    Encodings of other kinds (iso-2022-jp, EBCDIC) are taken by their name.

    Raises:
        NotTextError: it is none of these, or more than one character in ten is NUL.
    """
    text = _decoded(content, encoding)
    if text.startswith(MARK):
        text = text.lstrip(MARK)
    if "\0" in text and text.count("\0") * _MAX_NULS > len(text):
        raise NotTextError(
            f"{text.count(chr(0)):,} of its {len(text):,} characters are NUL: it is binary, or UTF-16 or"
            " UTF-32 without a byte-order mark (tools/prepare_corpus.py reads those with --encoding utf-16-le"
            " or utf-32-le)"
        )
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def _decoded(content: bytes, encoding: str) -> str:
    marked = encoding_by_mark(content)
    if marked is None and (
        encoding == "utf-8" or has_ascii(encoding) or (is_wide(encoding) and b"\0" not in content)
    ):
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            if encoding == "utf-8":
                raise NotTextError(f"it is not UTF-8: {error.reason} at byte {error.start:,}") from error
    name = marked or encoding
    try:
        text = content.decode(name)
        text.encode()  # escapes of some encodings give half a surrogate pair
    except UnicodeError as error:
        raise NotTextError(f"it is not {name}: {error}") from error
    return text


def encoding_by_mark(head: bytes) -> str | None:
    """What the byte-order mark at the start of a file says of its encoding; None where there is none."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)


@cache
def is_wide(encoding: str) -> bool:
    """Whether each character has two bytes or four, so that those of ASCII hold a NUL byte."""
    try:
        return "A\n".encode(encoding).count(0) >= 2
    except UnicodeError:
        return False


@cache
def has_ascii(encoding: str) -> bool:
    """Whether ASCII text is the same bytes in this encoding."""
    try:
        return _ASCII.decode(encoding) == _ASCII.decode("ascii")
    except UnicodeError:
        return False


def known_encoding(name: str) -> str:
    """Python's own name of a text encoding.

    Raises:
        LookupError: there is none of this name.
    """
    try:
        b" ".decode(name)
    except UnicodeError:  # such as UTF-16, of which one byte is no text
        pass
    except ValueError as error:  # a name with a NUL
        raise LookupError(str(error)) from error
    return codecs.lookup(name).name
