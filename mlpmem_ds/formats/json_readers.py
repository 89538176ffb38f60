"""Read files of JSON as documents: an object a line, or a file that is an array of objects or one object."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlpmem_ds.formats.json_lines import json_records
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record, record_of
from mlpmem_ds.formats.streams import opened


def read_json(path: Path, rules: ReadRules) -> Iterator[Record | Omission]:
    """One record a line that is not blank, or an item of the array; its key is the line's or item's number
    from 1."""
    with opened(path) as stream:
        for place, number, values in json_records(stream, name=str(path), encoding=rules.encoding):
            yield record_of(path, place, str(number), values, rules.text_field, rules.group_field)
