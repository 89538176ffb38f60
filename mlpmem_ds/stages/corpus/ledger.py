"""Part of `prepare_corpus`: what was read and what was left out, said at the end and kept in the corpus."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.formats.corpus import SourceCounts
from mlpmem_ds.formats.omissions import Omission, count_by_reason, describe_omissions
from mlpmem_ds.stages.corpus.near_duplicates import LIST_FILE
from mlpmem_ds.stages.corpus.survey import Survey

LEFT_OUT_FILE = "left_out.jsonl"
_OF_WHOLE_FILES = ("encoding", "misnamed", "pointer", "unreadable")


def count_sources(survey: Survey) -> dict[str, SourceCounts]:
    """Kind of files → how many were read, and their documents; kinds in the order of the alphabet.

    A file that was found and then left out whole is not counted.
    """
    unread = {omission.name for omission in survey.omissions if omission.reason in _OF_WHOLE_FILES}
    files: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for unit in survey.units:
        for file, count in zip(unit.files, unit.counts, strict=True):
            if count or file.name not in unread:
                files[file.kind] += 1
                documents[file.kind] += count
    return {kind: SourceCounts(files=files[kind], documents=documents[kind]) for kind in sorted(files)}


def refuse_lost_text(omissions: Sequence[Omission]) -> None:
    """What `--strict` asks for.

    Raises:
        UserError: something that may hold text was left out against the user's will.
    """
    lost = [omission for omission in omissions if omission.loses_text]
    if lost:
        raise UserError(f"--strict: the inputs are not read whole: {'; '.join(describe_omissions(lost))}")


def write_ledger(survey: Survey, writer: UnitWriter) -> dict[str, Any]:
    """The whole list of what was left out, one JSON object a line; the numbers are the summary. Next to it
    that of near duplicates, where there are any."""
    with (
        writer.file(LEFT_OUT_FILE) as path,
        open(path, "w", encoding="utf-8", newline="\n") as stream,
    ):
        stream.writelines(_lines(survey.omissions))
    if survey.repetitions:
        with (
            writer.file(LIST_FILE) as path,
            open(path, "w", encoding="utf-8", newline="\n") as stream,
        ):
            stream.writelines(repetition.to_line() for repetition in survey.repetitions)
    return {
        "sources": {kind: asdict(counts) for kind, counts in count_sources(survey).items()},
        "left_out": count_by_reason(survey.omissions),
    }


def lists_others(path: Path, omissions: Sequence[Omission]) -> bool:
    """Whether a list on the disk is not of these omissions. What is left out does not bind a corpus: a rerun
    keeps the list of the run that made it."""
    with open(path, encoding="utf-8", newline="\n") as stream:
        listed = itertools.zip_longest(stream, _lines(omissions))
        return any(old != new for old, new in listed)


def _lines(omissions: Sequence[Omission]) -> Iterator[str]:
    for omission in omissions:
        yield json.dumps(omission.to_json(), ensure_ascii=False) + "\n"


def table_lines(sources: dict[str, SourceCounts], omissions: Sequence[Omission]) -> list[str]:
    """The table at the end: a line for each kind that was read and for each reason to leave out."""
    read = [
        f"read      {kind}: {counts.files:,} files, {counts.documents:,} documents"
        for kind, counts in sources.items()
    ]
    left_out = [f"left out  {line}" for line in describe_omissions(omissions)]
    return [*read, *(left_out or ["left out  nothing"])]
