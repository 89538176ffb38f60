"""Data sets of the package `datasets`: saved to a folder, or streamed by name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.records import Record, record_of


def is_saved_dataset(root: Path) -> bool:
    """Whether `datasets` saved this directory (`save_to_disk`): one data set, or one a split."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def datasets_files(root: Path) -> list[Path]:
    """The Arrow files of a saved data set, in its order.

    Raises:
        UserError: its lists of files cannot be read, or a file is missing.
    """
    try:
        if (root / "dataset_dict.json").is_file():
            splits = json.loads((root / "dataset_dict.json").read_bytes())["splits"]
            return [file for split in splits for file in datasets_files(root / Path(split).name)]
        names = [entry["filename"] for entry in json.loads((root / "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--input {root} is a saved data set whose list of files cannot be read ({error!r})"
        ) from error
    files = [root / Path(name).name for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"--input {root} is a saved data set without its file {missing[0].name}: save or copy it again"
        )
    return files


def read_dataset_of_name(path: Path, text_field: str, group_field: str | None) -> Iterator[Record]:
    """`datasets:NAME[:CONFIGURATION[:SPLIT]]`, streamed by the package `datasets`; the split is `train` by
    default."""
    _, name, *rest = str(path).split(":")
    configuration, split = (rest[0] or None) if rest else None, rest[1] if len(rest) > 1 else "train"
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"{path} needs the package datasets, which is not installed: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True)
    except Exception as error:  # a family of errors for each way to fail
        raise UserError(
            f"{path} cannot be loaded ({error}): check the name, the configuration and the network"
        ) from error
    for number, values in enumerate(rows):
        record = record_of(path, f"row {number}", str(number), values, text_field, group_field)
        if record is not None:
            yield record
