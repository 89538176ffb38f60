"""Directories of models that this package wrote: their files are compared with what was recorded of them
before a number of them is used.

    BASE, BASELINE, fetched base, OUTPUT of a training     manifest.json names the files
    EXPORT                                                 mlpmem_export.json does
    CORPUS/tokenizer, OUTPUT/weights                       manifest.json of the directory above does

Of a directory of others nothing is known, and nothing is compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.file_lists import files_of, records_in
from mlpmem_ds.core.files import FileRecord, first_fault, read_sealed_json
from mlpmem_ds.core.manifest import is_own_directory
from mlpmem_ds.core.objects.on_demand import remedy_of

EXPORT_FILE = "mlpmem_export.json"
_FOR_PEOPLE = (".md", ".py")  # not read: the code of an export is our own, the card is for people
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
