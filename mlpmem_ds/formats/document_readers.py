"""The readers of files that hold many documents, and the one that a file's name calls for.

Each reader yields records in the file's order and holds one of them, or one batch, in memory. A record
without its text is an error that names the file and the record.
"""

from __future__ import annotations

from pathlib import Path

from mlpmem_ds.formats.json_readers import read_json
from mlpmem_ds.formats.records import Reader
from mlpmem_ds.formats.streams import COMPRESSED_SUFFIXES
from mlpmem_ds.formats.table_readers import read_table
from mlpmem_ds.formats.tar_readers import read_tar

# kind → suffixes; the second ones may be compressed
_PLAIN_SUFFIXES = {"table": (".parquet", ".parq", ".pq", ".arrow", ".arrows", ".feather", ".ipc")}
_STREAM_SUFFIXES = {
    "json": (".jsonl", ".json", ".ndjson", ".jsonlines"),
    "tar": (".tar",),
}
_SUFFIXES = {
    **_PLAIN_SUFFIXES,
    **{
        kind: tuple(suffix + packed for suffix in suffixes for packed in ("", *COMPRESSED_SUFFIXES))
        for kind, suffixes in _STREAM_SUFFIXES.items()
    },
}
_SUFFIXES["tar"] += (".tgz", ".tbz2", ".txz", ".tzst")
_ALL_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)


def kind_of(path: Path) -> str:
    """The kind of reader that a file's name calls for, in small or capital letters; `text` where it is one
    document."""
    name = path.name.lower()
    if not name.endswith(_ALL_SUFFIXES):  # one question to each of a million text files
        return "text"
    return next(kind for kind, suffixes in _SUFFIXES.items() if name.endswith(suffixes))


READERS: dict[str, Reader] = {
    "json": read_json,
    "table": read_table,
    "tar": read_tar,
}
