"""What a later stage reads of an earlier one first: its manifest, and whether its files are all there.

The own fields of a format are a frozen dataclass next to its reader (`KeysManifest`, `TargetsManifest`, …):
stages fill it, readers hand it out, and nothing else knows how it is spelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord, fault_of_file, read_json, read_sealed_json, sha256_of_file
from mlpmem_ds.core.typed_json import from_json, to_json

_FRONT_ENDS = {
    "corpus": "prepare_corpus",
    "base": "train_base",
    "keys": "extract_keys",
    "index": "build_index",
    "targets": "write_targets",
    "memory": "train",
    "report": "evaluate",
}  # format → what writes it, for messages
_REMEDY = "it remakes only what is damaged"


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
    """The fields that every manifest has; all but the files are those of identity.json."""

    format: str
    version: int
    inputs: Mapping[str, str]
    config: Mapping[str, Any]
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True)
class CompleteStage(Generic[AnyManifest]):
    """A complete stage directory.

    `sha256` of manifest.json, by which later stages name it; `inputs` name → SHA-256 of what it was made
    from; `config` the flags that its bytes depend on.
    """

    root: Path
    sha256: str
    inputs: Mapping[str, str] = field(repr=False, hash=False)
    config: Mapping[str, Any] = field(repr=False, hash=False)
    files: tuple[FileRecord, ...] = field(repr=False, hash=False)
    manifest: AnyManifest = field(repr=False, hash=False)

    @property
    def num_bytes(self) -> int:
        """All its files on disk."""
        return sum(record.bytes for record in self.files)

    def check_files(self, names: Iterable[str] | None = None) -> None:
        """Compare the files of these names, or all of them, with their checksums.

        Raises:
            DamagedDataError: one has another, or is not recorded.
        """
        for name in self._records if names is None else names:
            if fault := fault_of_file(self.root, self.record(name)):
                raise DamagedDataError(f"{fault}: run the stage that made {self.root} again, {_REMEDY}")

    def record(self, name: str) -> FileRecord:
        """What the manifest says of a file.

        Raises:
            DamagedDataError: nothing.
        """
        if name not in self._records:
            raise DamagedDataError(
                f"the manifest of {self.root} does not record {name}: run the stage that made it again,"
                f" {_REMEDY}"
            )
        return self._records[name]

    @cached_property
    def _records(self) -> dict[str, FileRecord]:
        return {record.name: record for record in self.files}


def read_stage(
    kind: Callable[..., AnyStage], manifest: type[Manifest], root: Path, *, flag: str, **own: Any
) -> AnyStage:
    """Read the manifest of a complete stage and check that its files are all there, by size.

    Args:
        kind: the record to make, a `CompleteStage` or one of its subclasses.
        manifest: the format's own fields.
        root: the stage's directory.
        flag: how the user named the directory, for messages.
        own: further fields of `kind`.

    Raises:
        UserError: missing, incomplete or of another kind.
        DamagedDataError: of another version, unreadable, with unknown or missing keys, or with a file missing
            or of another size.
    """
    values, sha256 = read_manifest(root, stage=manifest.FORMAT, version=manifest.VERSION, flag=flag)
    path = root / "manifest.json"
    common = {name: values.pop(name) for name in _Header.__dataclass_fields__ if name in values}
    header = from_json(_Header, common, where=str(path), version=manifest.VERSION)
    return kind(
        root=root,
        sha256=sha256,
        inputs=header.inputs,
        config=header.config,
        files=header.files,
        manifest=from_json(manifest, values, where=str(path), version=manifest.VERSION),
        **own,
    )


def read_manifest(root: Path, *, stage: str, version: int, flag: str) -> tuple[dict[str, Any], str]:
    """Read the manifest of a complete stage and check that its files are all there, by size.

    Args:
        root: the stage's directory.
        stage: format name, such as "keys".
        version: the version that the caller understands.
        flag: how the user named the directory, for messages.

    Returns:
        the manifest and its SHA-256.

    Raises:
        UserError: missing, incomplete or of another kind.
        DamagedDataError: of another version, unreadable, or with a file missing or of another size.
    """
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
    try:
        records = [FileRecord(**entry) for entry in manifest["files"]]
    except (KeyError, TypeError) as error:
        raise DamagedDataError(
            f"{path} is damaged: its list of files cannot be read; run its stage again, it writes it anew"
        ) from error
    for record in records:
        if fault := fault_of_file(root, record, checksum=False):
            raise DamagedDataError(f"{fault}: run the stage that made {root} again, {_REMEDY}")
    return manifest, sha256_of_file(path)


def format_of(root: Path) -> str | None:
    """The format of a directory of ours, complete or not, such as "keys"; None for any other directory."""
    for path in (root / "identity.json", root / "manifest.json"):
        if path.is_file():
            values = read_json(path)
            name = values.get("format") if isinstance(values, dict) else None
            return name.removeprefix("mlpmem-") if isinstance(name, str) else None
    return None


def _hint(stage: str) -> str:
    """The command whose output was expected."""
    return f": give the output of {_FRONT_ENDS[stage]}" if stage in _FRONT_ENDS else ""
