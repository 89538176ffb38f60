"""Samples of Parquet, of Arrow's stream and file formats, and of saved data sets; read whole by pyarrow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
from pyarrow import ipc, parquet

from mlpmem_ds.benchmarks.fuzz.documents import content_of, read_corpus, written
from mlpmem_ds.benchmarks.fuzz.target import Content, Damaged, Sample, Target
from mlpmem_ds.benchmarks.fuzz.texts import made_up_text

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_END_OF_OLD_STREAM = bytes(4)  # before Arrow 0.15


def _text_column(random: Random, texts: Sequence[str | None]) -> Any:
    """The texts as a column of one of the types that hold text."""
    kind = random.choice(("string", "large_string", "dictionary", "dictionary of large"))
    plain = pyarrow.array(texts, pyarrow.large_string() if "large" in kind else pyarrow.string())
    return plain.dictionary_encode() if "dictionary" in kind else plain


def table_of(random: Random, texts: Sequence[str]) -> tuple[Any, int]:
    """A column `text`, some rows without text, and other columns; and the number of those rows."""
    rows: list[str | None] = list(texts)
    num_empty = random.choice((0, 0, 0, 1, 2))
    for _ in range(num_empty):
        rows.insert(random.randrange(len(rows) + 1), random.choice((None, "", "\n")))
    columns = {"text": _text_column(random, rows)}
    for name in random.sample(("id", "tags", "meta", "author", "text2"), random.randint(0, 3)):
        columns[name] = {
            "id": pyarrow.array(range(len(rows)), pyarrow.int64()),
            "tags": pyarrow.array(
                [["a"] * random.randint(0, 3) for _ in rows], pyarrow.list_(pyarrow.string())
            ),
            "meta": pyarrow.array([{"x": 1.5} for _ in rows]),
            "author": pyarrow.array([made_up_text(random) for _ in rows]),
            "text2": pyarrow.nulls(len(rows)),
        }[name]
    return pyarrow.table(dict(sorted(columns.items(), key=lambda _: random.random()))), num_empty


def store_parquet(random: Random, folder: Path, texts: Sequence[str]) -> Sample:
    path = folder / "a.parquet"
    table, num_empty = table_of(random, texts)
    parquet.write_table(
        table,
        path,
        compression=random.choice(("none", "snappy", "gzip", "zstd", "brotli", "lz4")),
        row_group_size=random.choice((1, 3, 100)),
        data_page_size=random.choice((1, 1 << 20)),
        data_page_version=random.choice(("1.0", "2.0")),
        use_dictionary=random.random() < 0.5,
        write_page_checksum=random.random() < 0.3,
    )
    return Sample(
        inputs=(random.choice((path, folder)),),
        files=(path,),
        content=content_of(texts, num_empty=num_empty),
    )


def _write_ipc(random: Random, table: Any, path: Path, *, is_file: bool) -> None:
    compression = random.choice((None, None, "lz4", "zstd"))
    is_old = not is_file and random.random() < 0.2
    options = ipc.IpcWriteOptions(
        use_legacy_format=is_old,
        compression=compression,
        allow_64bit=True,
        unify_dictionaries=is_file,
        emit_dictionary_deltas=False,
    )
    new = ipc.new_file if is_file else ipc.new_stream
    with open(path, "wb") as stream, new(stream, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=random.choice((1, 2, 100)))


def store_arrow(random: Random, folder: Path, texts: Sequence[str]) -> Sample:
    """An Arrow stream or an Arrow file."""
    path = folder / "a.arrow"
    table, num_empty = table_of(random, texts)
    _write_ipc(random, table, path, is_file=random.random() < 0.5)
    return Sample(inputs=(path,), files=(path,), content=content_of(texts, num_empty=num_empty))


def store_dataset(random: Random, folder: Path, texts: Sequence[str]) -> Sample:
    """A data set as `datasets` saves it: some streams and three files of JSON."""
    root = folder / "saved"
    root.mkdir()
    stop = random.randrange(len(texts) + 1)
    parts = [part for part in (texts[:stop], texts[stop:]) if part]
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    schema = pyarrow.schema({"text": pyarrow.string(), "id": pyarrow.int64()})
    for name, part in zip(names, parts, strict=True):
        rows = [{"text": text, "id": number} for number, text in enumerate(part)]
        _write_ipc(random, pyarrow.Table.from_pylist(rows, schema=schema), root / name, is_file=False)
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "a1",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    info = {
        "features": {
            "text": {"dtype": "string", "_type": "Value"},
            "id": {"dtype": "int64", "_type": "Value"},
        },
        "splits": {"train": {"name": "train", "num_examples": len(texts), "dataset_name": "made_up"}},
    }
    (root / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    (root / "dataset_info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
    files = tuple(root / name for name in (*names, *names, "state.json"))
    return Sample(inputs=(root,), files=files, content=content_of(texts))


def _texts_of(table: Any) -> list[str | None]:
    column = table.column("text")
    column.validate(full=True)
    texts = column.to_pylist()
    if not all(text is None or isinstance(text, str) for text in texts):
        raise Damaged("a text that is none")
    return list(texts)


def _tables_in(content: bytes) -> list[Any]:
    """The tables of a file, whose mark says what it is; Arrow streams may follow each other."""
    if content.startswith(b"PAR1"):
        return [parquet.ParquetFile(pyarrow.BufferReader(content)).read(columns=["text"], use_threads=False)]
    if content.startswith(b"ARROW1"):
        return [ipc.open_file(pyarrow.BufferReader(content)).read_all()]
    source, tables = pyarrow.BufferReader(content), []
    while source.tell() < source.size():
        is_new = content[source.tell() :].startswith(_END_OF_STREAM[:4])
        tables.append(ipc.open_stream(source).read_all())
        if not content[: source.tell()].endswith(_END_OF_STREAM if is_new else _END_OF_OLD_STREAM):
            raise Damaged("no end of the stream")
    return tables


def expect(sample: Sample) -> Content:
    """All rows of the files, by pyarrow's own reader of a whole file."""
    try:
        files = [path for path in dict.fromkeys(sample.files) if path.suffix != ".json"]
        tables = [table for path in files for table in _tables_in(path.read_bytes())]
        return content_of(text for table in tables for text in _texts_of(table))
    except (OSError, ValueError, KeyError, MemoryError) as error:  # pyarrow's errors are among these
        raise Damaged(repr(error)[:200]) from error


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(name="parquet", write=written(store_parquet), read=read_corpus, expect=expect),
        Target(name="arrow", write=written(store_arrow), read=read_corpus, expect=expect),
        Target(name="dataset", write=written(store_dataset), read=read_corpus, expect=expect),
    )
}
