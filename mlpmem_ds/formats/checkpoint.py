"""Training checkpoints: DeepSpeed's files, published by us. See README.md.

A checkpoint directory appears whole: it is filled as `step-<n>.tmp`, described by a manifest with the size
and checksum of every file, flushed, renamed, and only then named in `latest.json`. A reader believes the
manifest, not the pointer.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mlpmem_ds.core.claims import remove_dead_claims
from mlpmem_ds.core.directories import put_back_former, remove_former, replace_directory
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import (
    FileRecord,
    fault_of_file,
    flush,
    publish_json,
    read_sealed_json,
    record_file,
    sealed_json,
)
from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.core.typed_json import from_json

_NAME = re.compile(r"step-(\d{8})")
BEST_WEIGHTS = "best"
"""the folder of a checkpoint with the weights of the best validation until then, where they are needed"""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def bytes_of_parameter(weight_bytes: int, *, zero_stage: int) -> int:
    """Of a trained parameter in DeepSpeed's files: its float32 weight and two moments, and below ZeRO 3 also
    the weight that the forward reads, of `weight_bytes`."""
    return 12 if zero_stage == 3 else 12 + weight_bytes


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest(Manifest):
    """A checkpoint of `world` ranks: `subject` what is trained, and by which run (a checkpoint of another
    subject is refused), `values` the trainer's own state. Both are plain values."""

    FORMAT: ClassVar[str] = "checkpoint"
    VERSION: ClassVar[int] = 1

    step: int
    world: int
    zero_stage: int
    skipped_steps: int
    subject: Mapping[str, Any]
    values: Mapping[str, Any]
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A published checkpoint and its manifest."""

    path: Path
    manifest: CheckpointManifest = field(repr=False)

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def files(self) -> list[Path]:
        """By its manifest: a rank's listing may lack what other hosts wrote a minute ago."""
        return [self.path / record.name for record in self.manifest.files]


def list_checkpoints(root: Path) -> list[Path]:
    """The published checkpoint directories below `root`, newest first; not yet verified."""
    found = (
        [path for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
        if root.is_dir()
        else []
    )
    return sorted(found, key=lambda path: path.name, reverse=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest; its files are not looked at.

    Raises:
        DamagedDataError: the manifest is missing, unreadable or of another format or version.
    """
    values = read_sealed_json(path / "manifest.json")
    kind = (values.pop("format", None), values.pop("version", None))
    if kind != (f"mlpmem-{CheckpointManifest.FORMAT}", CheckpointManifest.VERSION):
        raise DamagedDataError(
            f"{path} is not a checkpoint of version {CheckpointManifest.VERSION}: its manifest says {kind}"
        )
    where = str(path / "manifest.json")
    manifest = from_json(CheckpointManifest, values, where=where, version=CheckpointManifest.VERSION)
    return Checkpoint(path=path, manifest=manifest)


def fault_of_checkpoint(path: Path, *, rank: int = 0, size: int = 1) -> str | None:
    """Say what is wrong with a checkpoint, or None. Each rank hashes its share of the files."""
    try:
        records = read_checkpoint(path).manifest.files
    except DamagedDataError as error:
        return str(error)
    return next(filter(None, (fault_of_file(path, record) for record in records[rank::size])), None)


def record_and_flush(root: Path, names: Sequence[str]) -> list[FileRecord]:
    """Flush the named files to disk and take their sizes and checksums."""
    for name in names:
        flush(root / name)
    return [record_file(root, name) for name in names]


def publish_checkpoint(root: Path, manifest: CheckpointManifest) -> Path:
    """Turn `step-<n>.tmp`, whose files are flushed, into the checkpoint `step-<n>`, and point `latest.json`
    at it.

    Args:
        root: OUTPUT/checkpoints.
        manifest: what it holds; its files are those of the directory.
    """
    final = root / checkpoint_name(manifest.step)
    temporary = final.with_name(final.name + ".tmp")
    kind = {"format": f"mlpmem-{manifest.FORMAT}", "version": manifest.VERSION}
    (temporary / "manifest.json").write_bytes(sealed_json({**kind, **manifest.to_json()}))
    if final.exists() and fault_of_checkpoint(final) is None:
        shutil.rmtree(temporary)  # an earlier save of the same step: the same state
    else:
        replace_directory(final, temporary)
    publish_json(root.parent / "latest.json", {"step": manifest.step})
    return final


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it again; the user may look at it."""
    aside = path.with_name(path.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    remove_former(path)
    os.replace(path, aside)
    return aside


def remove_old_checkpoints(root: Path, keep: int, *, needed: Collection[Path] = ()) -> None:
    """Remove all but the newest `keep` and those that are `needed`."""
    for path in list_checkpoints(root)[keep:]:
        if path not in needed:
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, and what a replacement of it that was cut off has left.

    Its manifest goes first: who reads it meanwhile finds none, and not one that lacks files.
    """
    remove_former(path)
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path)


def remove_unfinished(root: Path) -> None:
    """End a replacement that a killed run had begun, and remove what it left half written (`*.tmp`).

    A replacement begins when the new checkpoint is whole: it is the one that counts, because the former
    may have been damaged.
    """
    if not root.is_dir():
        return
    remove_dead_claims(root)
    for left in [path for path in root.glob(".step-*") if path.suffix in (".former", ".gone")]:
        final = root / left.stem.removeprefix(".")
        temporary = final.with_name(final.name + ".tmp")
        if left.suffix == ".former" and not final.exists() and (temporary / "manifest.json").is_file():
            replace_directory(final, temporary)
        else:
            put_back_former(final)
    for path in root.glob("step-*.tmp"):
        shutil.rmtree(path)
