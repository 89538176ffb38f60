"""The three standard streams of a front-end, as users' shells leave them: closed, not UTF-8, or a pipe that
no one reads any more."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

_NAMES = ("stdin", "stdout", "stderr")


def prepare_streams() -> None:
    """Make the standard streams take any text, and be there at all.

    A closed one becomes the empty device: else the next file that is opened would get its number, and what
    a library prints would be written into that file. A character that the stream's encoding lacks is written
    as `\\u03bb`.
    """
    for number, name in enumerate(_NAMES):
        with contextlib.suppress(OSError):
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    raw, encoding = getattr(sys.stdout, "buffer", None), getattr(sys.stdout, "encoding", "utf-8")
    if sys.stdout is sys.__stdout__ and isinstance(raw, io.FileIO):
        # PYTHONUNBUFFERED: what a nearly full disk or a closed pipe does not take at once would be lost.
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            with contextlib.suppress(OSError):  # what it holds already cannot be written
                stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """A line on standard error; where it is broken, nothing."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def end_streams() -> OSError | None:
    """Write what the streams still hold; the error of standard output, if any.

    A stream with an error writes to the empty device from now on: the interpreter would try once more when it
    ends, and complain.
    """
    failed = None
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except ValueError:  # closed
            continue
        except OSError as error:
            _write_nowhere(stream)
            failed = error if stream is sys.stdout else None
    return failed


def _write_nowhere(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def is_left_by_reader(error: BaseException) -> bool:
    """Whether the error is that who read our output has gone (`| head`); other pipes may break too."""
    return isinstance(error, OSError) and error.errno == errno.EPIPE and any(map(_is_broken, (1, 2)))


def _is_broken(number: int) -> bool:
    """Whether a pipe with this number has no reader; false where the system cannot tell."""
    if not hasattr(select, "poll"):
        return False
    asked = select.poll()
    asked.register(number, 0)
    with contextlib.suppress(OSError):
        return any(event & select.POLLERR for _, event in asked.poll(0))
    return False
