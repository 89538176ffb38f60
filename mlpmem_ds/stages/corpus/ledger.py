"""Part of `prepare_corpus`: what was read and what was left out, said at the end and kept in the corpus."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.formats.corpus import SourceCounts
from mlpmem_ds.formats.omissions import Omission, describe_omissions
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


def write_left_out(omissions: Sequence[Omission], writer: UnitWriter) -> None:
    """The whole list, one JSON object a line."""
    with (
        writer.file(LEFT_OUT_FILE) as path,
        open(path, "w", encoding="utf-8", newline="\n") as stream,
    ):
        for omission in omissions:
            stream.write(json.dumps(omission.to_json(), ensure_ascii=False) + "\n")


def table_lines(sources: dict[str, SourceCounts], omissions: Sequence[Omission]) -> list[str]:
    """The table at the end: a line for each kind that was read and for each reason to leave out."""
    read = [
        f"read      {kind}: {counts.files:,} files, {counts.documents:,} documents"
        for kind, counts in sources.items()
    ]
    left_out = [f"left out  {line}" for line in describe_omissions(omissions)]
    return [*read, *(left_out or ["left out  nothing"])]
