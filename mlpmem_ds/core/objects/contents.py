"""The files of a local directory as a mirror has them, and what their own records say of them.

A run directory holds several directories that are mirrored one by one: stages (identity.json), exports
(mlpmem_export.json) and, where asked for, a training's checkpoints (manifest.json without an identity). Any
other directory, such as a Hugging Face model, is mirrored as it is, also where it has files of such names.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlpmem_ds.core.directories import folders_with
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.file_lists import files_of, records_in
from mlpmem_ds.core.files import FileRecord, content_hash, read_sealed_json, record_file, sha256_of_file
from mlpmem_ds.core.manifest import format_of, is_own_directory
from mlpmem_ds.core.objects.listing import LAST_FILES
from mlpmem_ds.core.typed_json import to_json

IDENTITY, MANIFEST, EXPORT = "identity.json", *LAST_FILES
CHECKPOINTS = "checkpoints"
"""the folder of a stage whose directories are mirrored one by one, where they are asked for"""
_LISTS_OF = ("lists", "targets")
"""the name of a stage directory, and the format of the one that it is in for as long as that is written"""
_FOR_PEOPLE = ("run.json", "log")
Kind = Literal["stage", "listed", "plain"]


@dataclass(frozen=True, kw_only=True)
class UnitFiles:
    """What a unit's record names, and the record itself, which is sent after them."""

    record_path: Path
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True)
class LocalDirectory:
    """A directory that is mirrored. `name` is its path below what the user named, with slashes."""

    root: Path
    name: str
    kind: Kind

    @property
    def is_complete(self) -> bool:
        return self.kind != "stage" or (self.root / MANIFEST).is_file()

    def of(self) -> str:
        """What tells it from others, also before it is complete. A plain directory is read for it."""
        if self.kind == "stage":
            return content_hash(read_sealed_json(self.root / IDENTITY))
        if self.kind == "listed":
            return sha256_of_file(self._listed_in)
        records = [record_file(self.root, name) for name in self.names()]
        return content_hash(to_json(records))

    @property
    def _listed_in(self) -> Path:
        path = self.root / EXPORT
        return path if path.is_file() else self.root / MANIFEST

    def names(self) -> list[str]:
        """All its files, also behind links, those that make it complete last; no temporary ones, none of
        temporary directories, and none of the directories inside that are mirrored one by one."""
        found = []
        for folder, folders, names in os.walk(self.root, followlinks=True):
            place = Path(folder).relative_to(self.root)
            folders[:] = sorted(
                name
                for name in folders
                if not (name.startswith(".") or self._is_apart(place / name))
                and not _leads_back(Path(folder, name), self.root)
            )
            found += [(place / name).as_posix() for name in names if not _is_passing(name)]
        return sorted(found, key=lambda name: (name in LAST_FILES, name))

    def _is_apart(self, place: Path) -> bool:
        return self.kind == "stage" and (
            place.as_posix() == CHECKPOINTS or _is_passing_stage(self.root / place)
        )

    def units(self) -> Iterator[UnitFiles]:
        """The finished units of a stage, also of one that is at work; none of another directory."""
        if self.kind != "stage":
            return
        for folder, folders, names in os.walk(self.root / "done"):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if name.endswith(".json") and not _is_passing(name):
                    yield UnitFiles(record_path=path, files=tuple(records_in(read_sealed_json(path), path)))

    def recorded(self) -> dict[str, FileRecord]:
        """Name → what the directory's own list of files says; {} where there is none."""
        path = self.root / MANIFEST if self.kind == "stage" else self._listed_in
        if self.kind == "plain" or not path.is_file():
            return {}
        values = read_sealed_json(path)
        return {record.name: record for record in files_of(values, self.root)}


def is_for_people(name: str) -> bool:
    """Whether a stage's file is no part of the result: run.json, log.jsonl and the like."""
    return "/" not in name and name.startswith(_FOR_PEOPLE)


def directories_in(path: Path, *, checkpoints: bool = False) -> list[LocalDirectory]:
    """What is to be mirrored of a directory: itself, or the directories of a run.

    Raises:
        UserError: it does not exist.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no directory: give a stage's, a run's, or a URL")
    if (kind := kind_of(path)) is not None:
        found = [(path, kind)]
    else:
        found = [
            (folder, kind)
            for folder, _ in folders_with(path, (IDENTITY, EXPORT))
            if (kind := kind_of(folder)) is not None and not _is_passing_stage(folder)
        ]
    if not found:
        return [LocalDirectory(root=path, name="", kind="plain")]
    if checkpoints:
        for root, _ in list(found):
            steps = sorted((root / CHECKPOINTS).glob("step-*/" + MANIFEST))
            found += [(step.parent, "listed") for step in steps if step.parent.suffix == ""]
    return [
        LocalDirectory(root=root, name="" if root == path else root.relative_to(path).as_posix(), kind=kind)
        for root, kind in sorted(found)
    ]


def kind_of(root: Path) -> Kind | None:
    """None where no file says that it is ours: models, pages and data sets have a `manifest.json` too. One
    that says so is enough: a stage with a damaged identity is not sent as a directory of another program."""
    if not ((root / EXPORT).is_file() or any(is_own_directory(root, name) for name in (IDENTITY, MANIFEST))):
        return None
    return "stage" if (root / IDENTITY).is_file() else "listed"


def _leads_back(folder: Path, root: Path) -> bool:
    """Whether it is a link to a directory that was passed on the way from `root`, or that one of them lies
    in."""
    if not folder.is_symlink():
        return False
    passed = [parent.resolve() for parent in folder.parents if root in (parent, *parent.parents)]
    return folder.resolve() in {place for one in passed for place in (one, *one.parents)}


def _is_passing_stage(folder: Path) -> bool:
    """Whether a stage is part of the work on another one, and removed with it."""
    name, format_around = _LISTS_OF
    return folder.name == name and format_of(folder.parent) == format_around


def is_passing_name(name: str, names: Collection[str]) -> bool:
    """Whether a directory of a run, by its name, was part of the work on another one of `names`; stores that
    were filled by an earlier release may hold such."""
    around, _, last = f"/{name}".rpartition("/")
    return last == _LISTS_OF[0] and around[1:] in names


def _is_passing(name: str) -> bool:
    """Whether a file is not there to stay."""
    return name.startswith(".") or name.endswith((".tmp", ".partial", ".claim"))
