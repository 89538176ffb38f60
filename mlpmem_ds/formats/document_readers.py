"""The readers of files that hold many documents, and the one that a file's name calls for.

Each reader yields records in the file's order and holds one of them, or one batch, in memory. A record
without its text is an error that names the file and the record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.csv_readers import read_csv
from mlpmem_ds.formats.file_marks import JSON_LINES_SUFFIXES, TABLE_SUFFIXES
from mlpmem_ds.formats.installed_docs import read_docs
from mlpmem_ds.formats.json_readers import read_json
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import Reader, ReadRules, Record
from mlpmem_ds.formats.streams import COMPRESSED_SUFFIXES, COMPRESSED_TAR_SUFFIXES
from mlpmem_ds.formats.table_readers import read_table
from mlpmem_ds.formats.tar_readers import read_tar
from mlpmem_ds.formats.zip_readers import read_zip

# kind → suffixes; but for zip, the files may be compressed
_PLAIN_SUFFIXES = {
    "json": (*JSON_LINES_SUFFIXES, ".json"),
    "table": TABLE_SUFFIXES,
    "csv": (".csv", ".tsv", ".tab"),
    "tar": (".tar",),
}
_SUFFIXES = {
    "zip": (".zip",),
    **{
        kind: tuple(suffix + packed for suffix in suffixes for packed in ("", *COMPRESSED_SUFFIXES))
        for kind, suffixes in _PLAIN_SUFFIXES.items()
    },
}
_SUFFIXES["tar"] += COMPRESSED_TAR_SUFFIXES
_PART = re.compile(  # x.jsonl.gz.001, x.tar.part2, x.parquet-aa, as `split` writes them
    r"\.(?:jsonl|json|ndjson|jsonlines|tar|parquet|zip|t?gz|t?zst|t?bz2|t?xz)"
    r"[.\-_]?(?:\d{2,4}|a[a-z]|part[.\-_]?(?:\d{1,4}|a[a-z]))$"
)
_ALL_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)


def kind_of(path: Path) -> str:
    """The kind of reader that a file's name calls for, in small or capital letters; `text` where it is one
    document."""
    name = path.name.lower()
    if not name.endswith(_ALL_SUFFIXES):  # few questions to each of a million text files
        return "part" if _PART.search(name) else "text"
    return next(kind for kind, suffixes in _SUFFIXES.items() if name.endswith(suffixes))


def refuse_part(path: Path, rules: ReadRules) -> Iterator[Record | Omission]:
    """A part of a file that was split.

    Raises:
        UserError: always; says how to join the parts.
    """
    whole = re.sub(r"[.\-_]?(part)?[.\-_]?(\d+|a[a-z])$", "", path.name, flags=re.IGNORECASE)
    raise UserError(
        f"{path} is by its name one part of a file that was split: join the parts (cat) to {whole}"
        " and name that; if it is whole, give it a name with its suffix at the end"
    )


READERS: dict[str, Reader] = {
    "json": read_json,
    "csv": read_csv,
    "table": read_table,
    "tar": read_tar,
    "zip": read_zip,
    "part": refuse_part,
    "docs": read_docs,  # of inputs `docs:NAME` alone
}
