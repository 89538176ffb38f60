"""What of the inputs was left out, and why. A reader yields an `Omission` in the place of what it does not
read, so that nothing is left out in silence.

Whoever has a new reason writes it into `REASONS`: its words stand in the table at the end of
`prepare_corpus`, its name in the corpus' manifest and in left_out.jsonl.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlpmem_ds.core.names import printable

ReasonName = Literal[
    "empty",
    "not sampled",
    "shortened",
    "near duplicate",
    "no answer",
    "no conversations",
    "excluded",
    "not included",
    "already read",
    "not text",
    "system file",
    "own output",
    "data set cache",
    "unknown name",
    "other member",
    "next to a data set",
    "encoding",
    "unreadable",
    "linked folder",
    "broken link",
    "special file",
    "pointer",
    "misnamed",
]
_NAMES_SHOWN, _SUFFIXES_SHOWN, _CHARACTERS_SHOWN = 3, 8, 120
REASONS_BY_SUFFIX: tuple[ReasonName, ...] = (
    "unknown name",
    "not text",
    "not included",
    "other member",
    "no conversations",
)
"""their `detail` is the name's suffix"""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why something is left out.

    `words` follow a number in the table. `loses_text`: whether it may hold text that the user wants, which
    `--strict` refuses; not what he left out himself. `remedy`: what to do to have it read, or nothing.
    """

    words: str
    loses_text: bool
    remedy: str = ""


REASONS: Mapping[ReasonName, Reason] = {
    "empty": Reason(words="documents without text", loses_text=False),
    "not sampled": Reason(
        words="documents beyond --max-bytes, --max-train-bytes or --weights", loses_text=False
    ),
    "shortened": Reason(words="documents without their ends, by --shorten-documents", loses_text=False),
    "near duplicate": Reason(words="documents that nearly repeat another", loses_text=False),
    "no answer": Reason(
        words="conversations in which the assistant says nothing",
        loses_text=True,
        remedy="nothing of them would be trained on; without --documents chat they are read as texts",
    ),
    "no conversations": Reason(
        words="files that cannot hold conversations by their kind",
        loses_text=True,
        remedy="give them as a corpus of their own, without --documents chat; --exclude leaves them out",
    ),
    "excluded": Reason(words="names that --exclude leaves out", loses_text=False),
    "not included": Reason(words="names that match no pattern of --include", loses_text=False),
    "already read": Reason(words="files or folders that are read under another name", loses_text=False),
    "not text": Reason(words="files that are not text by their names", loses_text=False),
    "system file": Reason(words="files of the operating system or of version control", loses_text=False),
    "own output": Reason(words="outputs of this program", loses_text=False),
    "data set cache": Reason(words="caches of the package datasets next to its data", loses_text=False),
    "unknown name": Reason(
        words="names that no pattern knows",
        loses_text=True,
        remedy="--include with all patterns that count reads them, such as --include '*.txt' '*.log';"
        " --exclude leaves them out",
    ),
    "other member": Reason(
        words="members of archives that no reader takes",
        loses_text=True,
        remedy="unpack the archive and give the folder, with --include for their names",
    ),
    "next to a data set": Reason(
        words="files next to a saved data set that are no part of it",
        loses_text=True,
        remedy="give them as one more --input; --exclude leaves them out",
    ),
    "encoding": Reason(
        words="files that are not text in UTF-8, or in the --encoding that was given",
        loses_text=True,
        remedy="--encoding NAME reads another encoding, such as latin-1; --exclude leaves them out",
    ),
    "unreadable": Reason(
        words="files or folders that may not be read",
        loses_text=True,
        remedy="change their permissions; --exclude leaves them out",
    ),
    "linked folder": Reason(
        words="links to folders, which are not followed",
        loses_text=True,
        remedy="give the folder itself as one more --input; --exclude leaves it out",
    ),
    "broken link": Reason(
        words="links to nothing",
        loses_text=True,
        remedy="restore what they point to; --exclude leaves them out",
    ),
    "special file": Reason(
        words="pipes, sockets or devices",
        loses_text=True,
        remedy="write what they give to a file first; --exclude leaves them out",
    ),
    "misnamed": Reason(
        words="files of many documents under the name of a text",
        loses_text=True,
        remedy="rename them to *.jsonl, *.json, *.tar, *.parquet or *.arrow; --exclude leaves them out",
    ),
    "pointer": Reason(
        words="pointers of Git LFS or git-annex in the place of files",
        loses_text=True,
        remedy="fetch the files (git lfs pull, git annex get); --exclude leaves them out",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Omission:
    """Something that was not read.

    Args:
        name: the file's name below its input, and `:` and the place within it, as documents are named. A
            reader of a file gives the place alone (or "" for the whole file); `read_documents` puts the
            file's name before it.
        reason: a key of `REASONS`.
        detail: what distinguishes it from others of this reason (a suffix, the error's text); or nothing.
        count: how many of this reason and detail it stands for; `name` is then the first.
    """

    name: str
    reason: ReasonName
    detail: str = ""
    count: int = 1

    @property
    def loses_text(self) -> bool:
        return REASONS[self.reason].loses_text

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Omission:
        return cls(**values)


class MergedOmissions:
    """Those of one file, one for each reason and detail: a million images of an archive are one entry."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], Omission] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, omission: Omission) -> None:
        key = omission.reason, omission.detail
        self._first.setdefault(key, omission)
        self._counts[key] = self._counts.get(key, 0) + omission.count

    def all(self) -> list[Omission]:
        return [
            dataclasses.replace(first, count=self._counts[key]) if self._counts[key] != first.count else first
            for key, first in self._first.items()
        ]


def count_by_reason(omissions: Iterable[Omission]) -> dict[str, int]:
    """In the order of `REASONS`, without those that do not occur."""
    counts: dict[str, int] = dict.fromkeys(REASONS, 0)
    for omission in omissions:
        counts[omission.reason] += omission.count
    return {reason: count for reason, count in counts.items() if count}


def describe_omissions(omissions: Sequence[Omission]) -> list[str]:
    """A line for each reason: how many, the first names, what to do."""
    lines = []
    by_reason: dict[str, list[Omission]] = {reason: [] for reason in REASONS}
    for omission in omissions:
        by_reason[omission.reason].append(omission)
    for reason, kind in REASONS.items():
        some = by_reason[reason]
        if not some:
            continue
        shown = _suffixes(some) if reason in REASONS_BY_SUFFIX else _names(some)
        lines.append(
            f"{kind.words}: {sum(omission.count for omission in some):,}"
            + (f" ({', '.join(shown)})" if shown else "")
            + (f"; {kind.remedy}" if kind.remedy else "")
        )
    return lines


def _names(omissions: Sequence[Omission]) -> list[str]:
    names = [_shown(omission) for omission in omissions[:_NAMES_SHOWN] if omission.name]
    return [*names, "…"] if len(omissions) > _NAMES_SHOWN else names


def _suffixes(omissions: Sequence[Omission]) -> list[str]:
    """The most frequent suffixes, each with its number and the first name."""
    first: dict[str, Omission] = {}
    counts: Counter[str] = Counter()
    for omission in omissions:
        first.setdefault(omission.detail, omission)
        counts[omission.detail] += omission.count
    shown = [
        f"{count:,} {_short(suffix) or 'without a suffix'} as {_short(first[suffix].name)}"
        for suffix, count in counts.most_common(_SUFFIXES_SHOWN)
    ]
    return [*shown, "…"] if len(counts) > _SUFFIXES_SHOWN else shown


def _shown(omission: Omission) -> str:
    more = f" and {omission.count - 1:,} more" if omission.count > 1 else ""
    return f"{_short(omission.name)}{more}"


def _short(name: str) -> str:
    """A name for a line of a log, its middle left out where it is long."""
    if len(name) > _CHARACTERS_SHOWN:
        name = f"{name[: _CHARACTERS_SHOWN // 2]}…{name[-_CHARACTERS_SHOWN // 2 :]}"
    return printable(name)
