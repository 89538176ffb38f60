"""Data sets of the package `datasets`: saved to a folder (`save_to_disk`), or streamed by name.

    DIR/dataset_dict.json      {"splits": [NAME, ...]}: one saved data set a split, in DIR/NAME
    DIR/state.json             {"_data_files": [{"filename": NAME}, ...], ...}: Arrow streams, in their order
    DIR/dataset_info.json      about the data set from which this one may have been selected; not read: its
                               counts of rows stay as they were

Other programs' folders have files of the same names: what is in them decides.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError, in_one_line
from mlpmem_ds.formats.chats import chat_record
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record, record_of

_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
SAVED_DATASET_MARKS = (_DICT, _STATE)
"""a folder without one of these files is no saved data set"""


def is_saved_dataset(root: Path) -> bool:
    """Whether `datasets` saved this directory (`save_to_disk`): one data set, or one a split.

    A list of files that is damaged counts, where what lies next to it shows what it was.
    """
    if (root / _DICT).is_file() and any(map(_is_one_dataset, filter(Path.is_dir, root.iterdir()))):
        return True
    return _is_one_dataset(root)


def _is_one_dataset(root: Path) -> bool:
    if not (root / _STATE).is_file():
        return False
    content = _json(root / _STATE)
    return "_data_files" in content if isinstance(content, dict) else (root / _INFO).is_file()


def _json(path: Path) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


def datasets_files(root: Path) -> list[Path]:
    """The Arrow files of a saved data set, in its order.

    Raises:
        UserError: its lists of files cannot be read, a file is missing, or its rows are to be read in another
            order than they are stored.
    """
    try:
        if (root / _DICT).is_file():
            splits = [Path(split).name for split in json.loads((root / _DICT).read_bytes())["splits"]]
            if missing := [split for split in splits if not (root / split / _STATE).is_file()]:
                raise UserError(
                    f"--input {root} is a saved data set without its split {missing[0]}: save or copy it"
                    " again"
                )
            return [file for split in splits for file in datasets_files(root / split)]
        state = json.loads((root / _STATE).read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
        has_indices = bool(state.get("_indices_data_files") or state.get("_indices_files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--input {root} is a saved data set whose list of files cannot be read ({error!r}): save or copy"
            " it again"
        ) from error
    if has_indices:
        raise UserError(
            f"--input {root} is a saved data set whose rows were selected or shuffled after they were written"
            " (it has indices): load it with a version of datasets that can, and save"
            " DATASET.flatten_indices()"
        )
    files = [root / Path(name).name for name in names]
    if lost := [file for file in files if not os.path.isfile(file)]:
        raise UserError(
            f"--input {root} is a saved data set without its file {lost[0].name}: save or copy it again"
        )
    return files


def others_of_dataset(root: Path, files: Iterable[Path]) -> list[Path]:
    """What lies in the folders of a saved data set and is neither one of its `files` nor about it."""
    own_files = {*files, *(root / name for name in (_DICT, _STATE, _INFO))}
    folders = [root]
    if (root / _DICT).is_file():
        splits = sorted({root / Path(split).name for split in _json(root / _DICT)["splits"]})
        own_files |= {*splits, *(split / name for split in splits for name in (_STATE, _INFO))}
        folders += splits
    return [path for folder in folders for path in sorted(folder.iterdir()) if path not in own_files]


def read_dataset_of_name(path: Path, rules: ReadRules) -> Iterator[Record | Omission]:
    """`datasets:NAME[:CONFIGURATION[:SPLIT]]`, streamed by the package `datasets`; the split is `train` by
    default.

    Raises:
        UserError: there is no such data set, a record has not the fields, or the package is not installed.
    """
    _, name, *rest = str(path).split(":", 3)  # a split may hold colons of its own
    configuration, split = (rest[0] or None) if rest else None, rest[1] if len(rest) > 1 else "train"
    if not name or not split:
        raise UserError(f"{path} names no data set: datasets:NAME[:CONFIGURATION[:SPLIT]]")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"{path} needs the package datasets, which is not installed: pip install datasets"
        ) from error
    try:
        for number, values in enumerate(
            datasets.load_dataset(name, configuration, split=split, streaming=True)
        ):
            place, key = f"row {number}", str(number)
            if rules.chats:
                yield chat_record(path, place, key, values, rules.group_field)
            else:
                yield record_of(path, place, key, values, rules.text_field, rules.group_field)
    except UserError:
        raise
    except Exception as error:  # a family of errors for each way to fail, also in the midst of the rows
        raise UserError(
            f"{path} cannot be loaded or read on ({type(error).__name__}: {in_one_line(error)}): check the"
            " name, the configuration, the split and the network"
        ) from error
