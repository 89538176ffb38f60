"""Which names of a directory's files count: the patterns of the user, or the program's own."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mlpmem_ds.core.names import spell_path
from mlpmem_ds.formats.file_marks import (
    JSON_LINES_SUFFIXES,
    TABLE_SUFFIXES,
    is_no_text_by_name,
    is_system_file,
)
from mlpmem_ds.formats.omissions import ReasonName
from mlpmem_ds.formats.streams import COMPRESSED_SUFFIXES, COMPRESSED_TAR_SUFFIXES

TEXT_PATTERNS = (
    "*.txt",
    "*.md",
    "*.rst",
    "*.py",
    "*.pyi",
    "*.c",
    "*.h",
    "*.cc",
    "*.cpp",
    "*.hpp",
    "*.rs",
    "*.go",
    "*.java",
    "*.js",
    "*.ts",
    "*.rb",
    "*.sh",
    "*.html",
    "*.css",
    "*.tex",
)
_OF_MANY_DOCUMENTS = (*JSON_LINES_SUFFIXES, *TABLE_SUFFIXES, ".tar", *COMPRESSED_TAR_SUFFIXES, ".zip")
FILE_PATTERNS = (*TEXT_PATTERNS, *(f"*{suffix}" for suffix in _OF_MANY_DOCUMENTS))
"""names that count in a directory unless the user said which do: in small or capital letters, and each also
with the suffix of a compression after it"""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which names of a directory count."""

    is_included: Callable[[str], bool]
    """of a file's name, without its folder"""
    is_included_path: Callable[[str], bool]
    """of its path: for patterns with a slash, which no name has"""
    is_excluded: Callable[[str], bool]
    is_default: bool
    """whether the patterns are the program's own"""

    @classmethod
    def of(cls, include: Sequence[str] | None, exclude: Sequence[str]) -> Choice:
        return cls(
            is_included=_is_known if include is None else _matcher(include),
            is_included_path=_matcher([pattern for pattern in include or () if "/" in pattern]),
            is_excluded=_matcher([pattern.rstrip("/") for pattern in exclude]),
            is_default=include is None,
        )

    def includes(self, path: str) -> bool:
        """Whether the patterns ask for a file, by its name or by its path."""
        return self.is_included(path.rpartition("/")[2]) or self.is_included_path(path)

    def reason_against(self, path: str) -> ReasonName | None:
        """Why a file does not count by its name; None where it does."""
        name = path.rpartition("/")[2]
        if self.is_excluded(name) or self.is_excluded(path):
            return "excluded"
        if self.includes(path):
            return None
        if is_system_file(name):
            return "system file"
        if not self.is_default:
            return "not included"
        return "not text" if is_no_text_by_name(name) else "unknown name"


def unused_patterns(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The patterns that match none of the names, which are paths; a folder's ends with a slash."""
    left = {pattern: _matcher([spell_path(pattern.rstrip("/"))]) for pattern in patterns}
    for name in names:
        if not left:
            break
        path = name.rstrip("/")
        used = [one for one, matches in left.items() if matches(path) or matches(path.rpartition("/")[2])]
        for pattern in used:
            del left[pattern]
    return list(left)


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name matches one of them."""
    if not patterns:
        return lambda name: False
    match = re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns)).match
    return lambda name: match(name) is not None


_matches_known = _matcher(FILE_PATTERNS)


def _is_known(name: str) -> bool:
    """Whether a name counts by FILE_PATTERNS."""
    name = name.lower()
    if name.endswith(COMPRESSED_SUFFIXES):
        name = name.rpartition(".")[0]
    return _matches_known(name)
