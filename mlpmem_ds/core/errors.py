"""The errors that a front-end turns into exit code 2: they are the user's to mend, and the message says
how. One of them, a lost rank, has its own code: there is nothing to mend but to start again."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A wrong input, flag or environment; the message holds the numbers and names the remedy."""


class DamagedDataError(UserError):
    """A file of ours that is truncated, altered, missing or of an unknown version; names the file and the
    remedy."""


class LostRankError(UserError):
    """Another rank of the launch is gone: exit code `LOST_RANK`. The same command continues."""


REFUSED, LOST_RANK = 2, 75
"""exit codes; 75 is that of temporary failures in sysexits.h"""


FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""numbers of the system's errors that say there is no room to write a file"""


@contextmanager
def package_for(flag: str, name: str, remedy: str) -> Iterator[None]:
    """Within, an import that fails raises a UserError: what needs the package, the reason, and the remedy."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{flag} needs the package {name} ({error}): {remedy}") from error


_MAX_LENGTH = 500  # characters of a line; some libraries put whole tables into their messages


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message that says something; its type's name where none does.

    Only a line feed ends a line: a file name may hold any other separator.
    """
    lines = (line.strip() for line in str(error).split("\n"))
    line = next(filter(None, lines), "")
    if not line:
        line = type(error).__name__ if isinstance(error, BaseException) else "no message"
    return line if len(line) <= _MAX_LENGTH else f"{line[:_MAX_LENGTH]} …"


def in_one_line(error: Exception) -> str:
    """An error's message without line ends, for those that say what matters in the second line."""
    return " ".join(str(error).split())[:_MAX_LENGTH] or type(error).__name__
