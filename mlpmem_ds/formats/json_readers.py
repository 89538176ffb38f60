"""Read files of JSON as documents: an object a line, or a file that is an array of objects or one object."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.chats import chat_record
from mlpmem_ds.formats.json_lines import json_records
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record, record_of
from mlpmem_ds.formats.streams import opened


def holds_records(text: str, rules: ReadRules) -> bool:
    """Whether a whole text is JSON of which every record has a text: then it was meant to be read as such."""
    if text[:64].lstrip()[:1] not in ("{", "["):
        return False
    has_any = False
    try:
        for place, number, values in json_records(io.BytesIO(text.encode()), name=""):
            record_of(Path(), place, str(number), values, rules.text_field, None)
            has_any = True
    except UserError:
        return False
    return has_any


def read_json(path: Path, rules: ReadRules) -> Iterator[Record | Omission]:
    """One record a line that is not blank, or an item of the array; its key is the line's or item's number
    from 1."""
    with opened(path) as stream:
        for place, number, values in json_records(stream, name=str(path), encoding=rules.encoding):
            if rules.chats:
                yield chat_record(path, place, str(number), values, rules.group_field)
                continue
            yield record_of(path, place, str(number), values, rules.text_field, rules.group_field)
