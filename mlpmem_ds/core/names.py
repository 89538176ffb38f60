"""Names of files as text that can be written everywhere, and those that stay below a directory.

Python keeps a byte of a file's name that is not UTF-8 as half of a surrogate pair, which no UTF-8 file can
hold.
"""

from __future__ import annotations

import os
import re

_HEX = "[0-9a-f]"
_NOT_WRITABLE = re.compile(rf"[\ud800-\udfff]|\\(?=x{_HEX}{{2}}|u{_HEX}{{4}})")


def spell_name(name: str) -> str:
    r"""A name in valid Unicode: a byte that is not UTF-8 as `\xe9`, another half of a pair as `\ud83d`.

    Two names never get one spelling (it can be read back): where a name itself has a backslash
    before what looks like such a number, the backslash is written as `\x5c`. Other names stay as they are.
    """
    if name.isascii() and "\\" not in name:
        return name
    return _NOT_WRITABLE.sub(_spelled, name)


def spell_path(path: str) -> str:
    """The same of a file's path as the system gave it: its bytes are read as UTF-8 in every locale."""
    if not path.isascii():
        path = os.fsencode(path).decode("utf-8", "surrogateescape")
    return spell_name(path)


def is_name_inside(name: str) -> bool:
    """Whether a file of this name, with slashes, lies below any directory that the name is joined to."""
    return "\0" not in name and not any(part in ("", ".", "..") for part in name.split("/"))


def printable(text: str) -> str:
    """A name or a text for a line of a message: what would break the line, or move a terminal's cursor, is
    escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # as os.fsdecode keeps a byte
        return f"\\x{code - 0xDC00:02x}"
    return "\\x5c" if match[0] == "\\" else f"\\u{code:04x}"
