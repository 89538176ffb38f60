"""What a later stage reads of an earlier one first: its manifest, and whether its files are all there.

The own fields of a format are a frozen dataclass next to its reader (`KeysManifest`, `TargetsManifest`, …):
stages fill it, readers hand it out, and nothing else knows how it is spelled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.file_lists import LISTS_KEY, Files, files_of
from mlpmem_ds.core.files import (
    FileRecord,
    fault_of_content,
    fault_of_file,
    first_fault,
    read_json,
    read_sealed_json,
    sha256_of_file,
)
from mlpmem_ds.core.objects.on_demand import ensure, is_fetched_on_demand, remedy_of
from mlpmem_ds.core.typed_json import from_json, to_json

_logger = logging.getLogger(__name__)

MARKS_OF_OURS = ("identity.json", "manifest.json", "mlpmem_export.json")
"""names of the files that tell a directory of this project: a stage, a checkpoint, an export"""
_FRONT_ENDS = {
    "corpus": "prepare_corpus",
    "base": "train_base",
    "fetched-base": "fetch_base",
    "baseline": "train_baseline",
    "keys": "extract_keys",
    "index": "build_index",
    "targets": "write_targets",
    "memory": "train",
    "gate": "fit_gate",
    "report": "evaluate",
    "answers": "answer_questions",
}  # format → what writes it, for messages


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The own fields of a format; a subclass is a frozen dataclass and names its format and version."""

    FORMAT: ClassVar[str]
    """such as "keys"; in the file it is "mlpmem-keys" """
    VERSION: ClassVar[int]

    def to_json(self) -> dict[str, Any]:
        """The fields as they stand in the file."""
        values: dict[str, Any] = to_json(self)
        return values


AnyManifest = TypeVar("AnyManifest", bound=Manifest)
AnyStage = TypeVar("AnyStage", bound="CompleteStage[Any]")


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The fields that every manifest has, those of identity.json; the files are read apart."""

    format: str
    version: int
    inputs: Mapping[str, str]
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CompleteStage(Generic[AnyManifest]):
    """A complete stage directory.

    Who compares its files with what the manifest says: `read_stage` the sizes of all, or of a sample above
    1,000; `path_of` the size of a file whenever it is opened; `check_files` the checksums of those that a
    stage is about to read, because a flipped byte would be a wrong result in silence: large ones once, by one
    rank (core/verified_inputs.py), small ones once a process; `inspect_run` everything.

    `sha256` of manifest.json, by which later stages name it; `inputs` name → SHA-256 of what it was made
    from; `config` the flags that its bytes depend on.
    """

    root: Path
    sha256: str
    inputs: Mapping[str, str] = field(repr=False, hash=False)
    config: Mapping[str, Any] = field(repr=False, hash=False)
    files: Files = field(repr=False, hash=False)
    manifest: AnyManifest = field(repr=False, hash=False)

    @property
    def num_bytes(self) -> int:
        """All its files on disk."""
        return self.files.num_bytes

    def path_of(self, name: str) -> Path:
        """The path of a file that is about to be opened; of a directory in the cache it is fetched now
        (core/objects/on_demand.py). Ask again before it is opened again: it may have been dropped.

        Raises:
            DamagedDataError: it is missing, of another size, or not recorded.
        """
        record = self.record(name)
        ensure(self.root, record)
        if fault := fault_of_file(self.root, record, checksum=False):
            raise DamagedDataError(f"{fault}: {_remedy_of(self.root)}")
        return self.root / name

    def check_files(self, names: Iterable[str] | None = None) -> None:
        """Compare the files of these names, or all of them, with their checksums; not again what this process
        has compared.

        Raises:
            DamagedDataError: one has another, or is not recorded.
        """
        records = self.files if names is None else map(self.record, names)
        if is_fetched_on_demand(self.root):  # one after another: the cache may have room for few
            fault = next(filter(None, map(self._fault_after_fetching, records)), None)
        else:
            fault = first_fault(self.root, records)
        if fault:
            raise DamagedDataError(f"{fault}: {_remedy_of(self.root)}")

    def _fault_after_fetching(self, record: FileRecord) -> str | None:
        ensure(self.root, record)
        return fault_of_content(self.root, record)

    def record(self, name: str) -> FileRecord:
        """What the manifest says of a file.

        Raises:
            DamagedDataError: nothing.
        """
        record = self.files.find(name)
        if record is None:
            raise DamagedDataError(
                f"the manifest of {self.root} does not record {name}: {_remedy_of(self.root)}"
            )
        return record


def read_stage(
    kind: Callable[..., AnyStage],
    manifest: type[Manifest],
    root: Path,
    *,
    flag: str,
    has_files: bool = True,
    **own: Any,
) -> AnyStage:
    """Read the manifest of a complete stage and check that its files are there, by size: all up to 1,000,
    a sample of more. The others are checked when they are opened.

    Args:
        kind: the record to make, a `CompleteStage` or one of its subclasses.
        manifest: the format's own fields.
        root: the stage's directory.
        flag: how the user named the directory, for messages.
        has_files: without, the files may be elsewhere, and none is asked for.
        own: further fields of `kind`.

    Raises:
        UserError: missing, incomplete or of another kind.
        DamagedDataError: of another version, unreadable, with unknown or missing keys, or with a file missing
            or of another size.
    """
    values, sha256, files = _read(
        root, stage=manifest.FORMAT, version=manifest.VERSION, flag=flag, has_files=has_files
    )
    path = root / "manifest.json"
    common = {name: values.pop(name) for name in _Header.__dataclass_fields__ if name in values}
    own_values = {name: value for name, value in values.items() if name not in ("files", LISTS_KEY)}
    header = from_json(_Header, common, where=str(path), version=manifest.VERSION)
    return kind(
        root=root,
        sha256=sha256,
        inputs=header.inputs,
        config=header.config,
        files=files,
        manifest=from_json(manifest, own_values, where=str(path), version=manifest.VERSION),
        **own,
    )


def _read(
    root: Path, *, stage: str, version: int, flag: str, has_files: bool = True
) -> tuple[dict[str, Any], str, Files]:
    """The manifest, its SHA-256 and the files that it names."""
    path = root / "manifest.json"
    if not root.is_dir():
        raise UserError(f"{flag} {root} {'is a file' if root.exists() else 'does not exist'}{_hint(stage)}")
    if not path.is_file():
        state = (
            "is not complete: run its stage again, it continues"
            if (root / "identity.json").is_file()
            else f"is not a directory of mlpmem {stage}{_hint(stage)}"
        )
        raise UserError(f"{flag} {root} {state}")
    manifest = read_sealed_json(path)
    if manifest.get("format") != f"mlpmem-{stage}":
        raise UserError(f"{flag} {root} holds {manifest.get('format')}, not mlpmem-{stage}{_hint(stage)}")
    if manifest.get("version") != version:
        raise DamagedDataError(
            f"{flag} {root} has version {manifest.get('version')}, this program reads {version}: "
            "use the release that wrote it, or remake it"
        )
    files = files_of(manifest, root, version=version)
    for record in files.sample() if has_files and not is_fetched_on_demand(root) else ():
        if fault := fault_of_file(root, record, checksum=False):
            raise DamagedDataError(f"{fault}: {_remedy_of(root)}")
    return manifest, sha256_of_file(path), files


def format_of(root: Path) -> str | None:
    """The format of a directory of ours, complete or not, such as "keys"; None for any other directory."""
    for path in (root / "identity.json", root / "manifest.json"):
        if path.is_file():
            values = read_json(path)
            name = values.get("format") if isinstance(values, dict) else None
            return name.removeprefix("mlpmem-") if isinstance(name, str) else None
    return None


def is_own_directory(root: Path, name: str) -> bool:
    """Whether the file `name`, one of `MARKS_OF_OURS`, says that a directory is an output of ours."""
    try:
        values = json.loads((root / name).read_bytes())  # a seal that is broken makes it no other program's
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(values, dict) and str(values.get("format", "")).startswith("mlpmem-")


def _remedy_of(root: Path) -> str:
    return remedy_of(root, local=f"run the stage that made {root} again, it remakes only what is damaged")


def _hint(stage: str) -> str:
    """The command whose output was expected."""
    return f": give the output of {_FRONT_ENDS[stage]}" if stage in _FRONT_ENDS else ""


def remove_damaged_manifest(output: Path) -> None:
    """Take a manifest away that cannot be believed, or whose lists of files cannot: it is made from the
    units' records, which are whole."""
    path = output / "manifest.json"
    try:
        fault = files_of(read_sealed_json(path), output).fault_of_lists() if path.is_file() else None
    except DamagedDataError as error:
        fault = str(error)
    if fault:
        _logger.warning("%s: writing it anew", fault)
        path.unlink(missing_ok=True)
