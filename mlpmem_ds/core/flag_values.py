"""A word of the command line → the value of a flag, or argparse's error, which names the flag."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from mlpmem_ds.core.objects.urls import url_of

_MAX_DIGITS = 20  # of a whole number, so that 1e999999 is refused and not written out
# What a shell gives for a command's output (`<(…)`), or for this process's own streams.
_STREAMS = ("/dev/fd/", "/proc/self/fd/", "/dev/std", "/dev/null", "/dev/tty")


def converter_of(
    base: Callable[[str], Any],
    *,
    parse: Callable[[str], Any] | None = None,
    takes_url: bool = False,
    may_be_none: bool = False,
) -> Callable[[str], Any]:
    """What reads a word of a flag of this type; it raises ValueError or argparse's error for a wrong one.

    Args:
        base: the type.
        parse: reads the word instead, where the type alone does not say how.
        takes_url: a path may be a URL too, and stays as it was written.
        may_be_none: a number may be the word `none`.
    """
    if base is Path and parse is None:
        return _path if takes_url else _local_path
    by_type: dict[Any, Callable[[str], Any]] = {int: whole_number, str: _text}
    convert = parse or by_type.get(base, base)
    return _number_or_none(convert) if may_be_none and base in (int, float) else convert


def _text(word: str) -> str:
    """A word that says something: `--model "$BASE"` with an unset variable would mean anything."""
    if not word.strip():
        raise argparse.ArgumentTypeError(f"{word!r} is empty: is a variable unset?")
    return word


def _path(word: str) -> Path:
    """A path, with the home directory for `~/`, which shells leave as it is in `--output=~/run`."""
    _text(word)
    path = Path(os.path.expanduser(word)) if word == "~" or word.startswith("~/") else Path(word)
    if word[-1] in "\r\n" and not os.path.lexists(path):
        raise argparse.ArgumentTypeError(
            f"{word!r} ends with the end of a line: has the script the line ends of Windows?"
        )
    if "\0" in word:
        raise argparse.ArgumentTypeError(f"{word!r} holds a NUL byte, which no path can")
    if not str(path).startswith(_STREAMS) and _is_endless(path):
        raise argparse.ArgumentTypeError(f"{word!r} is a named pipe or a device: give a file or a directory")
    return path


def _local_path(word: str) -> Path:
    if url_of(word) is not None:
        raise argparse.ArgumentTypeError(
            f"{word!r} is a URL, and this is a local path: tools/mirror.py copies directories to URLs"
        )
    return _path(word)


def _is_endless(path: Path) -> bool:
    """Whether it is no file and no directory, so that who reads it may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def whole_number(word: str) -> int:
    """`64`, `1_000_000` or `1e9`; a fraction is refused. Raises argparse.ArgumentTypeError."""
    try:
        number = Decimal(word)
    except InvalidOperation:
        number = Decimal("NaN")
    is_whole = number.is_finite() and number.adjusted() < _MAX_DIGITS
    if not is_whole or number != number.to_integral_value():
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number, such as 1000000, 1_000_000 or 1e6")
    if abs(number) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{word!r} is too large: 9223372036854775807 is the largest")
    return int(number)


def _number_or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A number, or the word `none` for one that may be absent: off, or the default that the help names."""

    def number(word: str) -> Any:
        return None if word == "none" else convert(word)

    number.__name__ = getattr(convert, "__name__", "number")  # argparse names it: "invalid float value"
    return number
