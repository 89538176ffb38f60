"""A document as a file of many documents holds it: an object with a text field, and perhaps a group field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One document as a file holds it: `key` names it within the file; `group` is None where the file does
    not say."""

    key: str
    text: str
    group: str | None


def record_of(
    path: Path, place: str, key: str, values: Any, text_field: str, group_field: str | None
) -> Record | None:
    """The record of an object with the requested fields; None where its text is null."""
    requested = [text_field, *([group_field] if group_field else [])]
    if not isinstance(values, Mapping) or any(name not in values for name in requested):
        found = (
            f"it has {', '.join(map(str, values)) or 'none'}"
            if isinstance(values, Mapping)
            else "it is no object"
        )
        raise UserError(
            f"{path} {place} is not an object with the fields {', '.join(requested)} ({found}): name them"
            " with --text-field and --group-field"
        )
    text = values[text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(
            f"{path} {place}: its {text_field} is {type(text).__name__}, not text: choose another"
            " --text-field"
        )
    try:
        text.encode()  # a lone surrogate is no text
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path} {place}: its {text_field} cannot be written as UTF-8 ({error}): mend that record"
        ) from error
    return Record(key=key, text=text, group=str(values[group_field]) if group_field else None)
