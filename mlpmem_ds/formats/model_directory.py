"""Directories of models that this package wrote: their files are compared with what was recorded of them
before a number of them is used.

    BASE, BASELINE, fetched base, OUTPUT of a training     manifest.json names the files
    EXPORT                                                 mlpmem_export.json does
    CORPUS/tokenizer, OUTPUT/weights                       manifest.json of the directory above does

Of a directory of others nothing is known, and nothing is compared.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from mlpmem_ds.core.directories import former_of
from mlpmem_ds.core.errors import DamagedDataError, first_line
from mlpmem_ds.core.file_lists import files_of, records_in
from mlpmem_ds.core.files import FileRecord, first_fault, read_sealed_json
from mlpmem_ds.core.manifest import is_own_directory
from mlpmem_ds.core.objects.on_demand import remedy_of

EXPORT_FILE = "mlpmem_export.json"
_FOR_PEOPLE = (".md", ".py")  # not read: the code of an export is our own, the card is for people
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_PARTS = ("tokenizer", "weights")


def recorded_files(root: Path) -> Mapping[str, FileRecord]:
    """What a model's directory says of its own files, by name; nothing where it is not one of ours.

    Raises:
        DamagedDataError: it says so in a file that is damaged.
    """
    if is_own_directory(root, EXPORT_FILE):
        path = root / EXPORT_FILE
        records = list(records_in(read_sealed_json(path), path))
    elif is_own_directory(root, "manifest.json"):
        records = list(files_of(read_sealed_json(root / "manifest.json"), root))
    elif root.name in _PARTS and is_own_directory(root.parent, "manifest.json"):
        whole = files_of(read_sealed_json(root.parent / "manifest.json"), root.parent)
        start = f"{root.name}/"
        records = [
            replace(record, name=record.name.removeprefix(start)) for record in whole.starting_with(start)
        ]
    else:
        return {}
    return {record.name: record for record in records if not record.name.endswith(_FOR_PEOPLE)}


def absence_of(place: str | Path, *, what: str = "model", error: BaseException | None = None) -> str | None:
    """Why a name that no directory here has gave nothing, and what to check; None where there is one, or
    where the error says that the Hub gave something.

    Args:
        place: a directory, or a name on the Hub, which was asked for it.
        what: was looked for.
        error: of reading it; the Hub's client and transformers raise an OSError where there is nothing.
    """
    path = Path(place).expanduser()
    if path.exists():
        return None
    if former_of(path).is_dir():
        return (
            f"there is no such directory, but {former_of(path)}: a command was killed while it replaced it;"
            " run that command again, which puts it back or ends the replacement"
        )
    start = f"there is no such directory{_similar(path)}, and "
    if not _HUB_NAME.fullmatch(str(place)):
        return f"{start}it is no name of a {what} on the Hub: check the path"
    if error is not None and not isinstance(error, OSError):
        return None
    said = "" if error is None else f" ({first_line(error)})"
    return (
        f"{start}the Hub gave no {what} of that name{said}: check the path; of a name on the Hub also the"
        " network and HF_HUB_OFFLINE"
    )


def fault_of(place: str | Path, error: BaseException) -> str:
    """Why a model was not loaded: that there is none, else what its loader says."""
    return absence_of(place, error=error.__cause__ or error) or str(error)


def _similar(path: Path) -> str:
    try:
        names = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.with_name(found[0])}?)" if found else ""


def check_model_files(place: str | Path, *, flag: str, names: Collection[str] | None = None) -> None:
    """Compare the files of a model's directory with their checksums; what was compared in this process is not
    read again.

    Args:
        place: a directory, or a name on the Hub, whose client compares what it fetches.
        flag: how the user named it, for messages.
        names: of the files; None = all that are read.

    Raises:
        DamagedDataError: one has another checksum, or is missing.
    """
    root = Path(place)
    if not root.is_dir():
        return
    records = recorded_files(root).values()
    if fault := first_fault(root, (one for one in records if names is None or one.name in names)):
        raise DamagedDataError(f"{flag}: {fault}: {remedy_of_model(root)}")


def remedy_of_model(root: Path) -> str:
    """What to do about a file that does not have its checksum."""
    local = "run the command that made it again, it remakes only what is damaged"
    if (root / EXPORT_FILE).is_file():
        local = (
            "run tools/convert_checkpoint.py again, it makes the export anew (or remove"
            f" {EXPORT_FILE} where you changed the file yourself: then nothing is compared)"
        )
    return remedy_of(root.parent if root.name in _PARTS else root, local=local)
