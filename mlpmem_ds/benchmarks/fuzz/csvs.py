"""CSV with a line of names, and what it holds, read character by character."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from random import Random

from mlpmem_ds.benchmarks.fuzz.compression import decompressed
from mlpmem_ds.benchmarks.fuzz.documents import (
    content_of,
    decoded,
    encoded,
    in_one_file,
    read_corpus,
    written,
)
from mlpmem_ds.benchmarks.fuzz.target import Content, Damaged, Sample, Target
from mlpmem_ds.benchmarks.fuzz.texts import made_up_text

_SEPARATORS = ",;\t|"


def csv_of(random: Random, given: Sequence[str]) -> tuple[bytes, Content]:
    """Rows of a text and other fields, in one of the usual styles."""
    texts = [text.replace("\0", "") or "x" for text in given]  # Python 3.10 reads no NUL in CSV
    names = ["text", *random.sample(("id", "author", "x y", "url"), random.randint(0, 3))]
    random.shuffle(names)
    stream = io.StringIO(newline="")
    writer = csv.writer(
        stream,
        delimiter=random.choice(_SEPARATORS),
        lineterminator=random.choice(("\r\n", "\n")),
        quoting=csv.QUOTE_ALL,
    )
    writer.writerow(names)
    for text in texts:
        row = {name: made_up_text(random).replace("\0", "") for name in names} | {"text": text}
        writer.writerow([row[name] for name in names])
    return encoded(random, stream.getvalue()), content_of(texts)


def rows_of(text: str, separator: str) -> Iterator[list[str]]:
    """The rows, as RFC 4180 has them.

    Raises:
        Damaged: a carriage return within a field without quotes, text after a closing quote, or no
            closing one.
    """
    position, row = 0, list[str]()
    while position < len(text):
        if text[position] == '"':
            field, position = _quoted(text, position + 1)
        else:
            ends = [text.find(end, position) for end in (separator, "\n")]
            stop = min((end for end in ends if end >= 0), default=len(text))
            field, position = text[position:stop].removesuffix("\r"), stop
            if "\r" in field:
                raise Damaged("a carriage return within a field")
        row.append(field)
        rest = text[position : position + 2]
        if rest[:1] == separator:
            position += 1
            if position == len(text):
                row.append("")
        elif rest[:1] in ("\n", "") or rest == "\r\n":
            position += 1 + (rest == "\r\n")
            yield row
            row = []
        else:
            raise Damaged("text after a closing quote")
    if row:
        yield row


def _quoted(text: str, start: int) -> tuple[str, int]:
    """(a field, the position after its closing quote)."""
    parts = []
    while True:
        stop = text.find('"', start)
        if stop < 0:
            raise Damaged("no closing quote")
        parts.append(text[start:stop])
        if text[stop + 1 : stop + 2] != '"':
            return '"'.join(parts), stop + 1
        start = stop + 2


def expect_csv(sample: Sample) -> Content:
    """The column `text`; the separator is the one that gives it, and the most names."""
    text = decoded(decompressed(sample.files[0].read_bytes()))
    if not text.strip():
        return Content(values=[], num_empty=1)
    while not text.partition("\n")[0].strip():
        text = text.partition("\n")[2]
    names_by_separator = {}
    for separator in _SEPARATORS:
        try:
            names_by_separator[separator] = next(rows_of(text.partition("\n")[0].rstrip("\r"), separator), [])
        except Damaged:
            continue
    best = max(names_by_separator.items(), key=lambda item: ("text" in item[1], len(item[1])), default=None)
    if best is None or best[1].count("text") != 1:
        raise Damaged("no column of texts")
    separator, names = best
    rows = [row for row in rows_of(text, separator) if row not in ([], [""])][1:]
    if any(len(row) != len(names) for row in rows):
        raise Damaged("a row of another length")
    return content_of(row[names.index("text")] for row in rows)


store_csv = in_one_file((".csv", ".tsv"), csv_of)
TARGET = Target(name="csv", write=written(store_csv), read=read_corpus, expect=expect_csv)
