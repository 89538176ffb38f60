"""Training checkpoints (DeepSpeed's files, published by us) and the trained weights. See README.md.

A checkpoint directory appears whole: it is filled as `step-<n>.tmp`, described by a manifest with the size
and checksum of every file, flushed, renamed, and only then named in `latest.json`. A reader believes the
manifest, not the pointer.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import (
    FileRecord,
    canonical_json,
    fault_of_file,
    flush,
    publish_json,
    read_json,
    record_file,
    sealed_json,
)
from mlpmem_ds.core.manifest import read_manifest
from mlpmem_ds.core.stage_directory import UnitWriter

CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "mlpmem-checkpoint", 1
MEMORY_STAGE, MEMORY_VERSION = "memory", 1
_NAME = re.compile(r"step-(\d{8})")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A published checkpoint and its manifest."""

    path: Path
    manifest: dict[str, Any] = field(repr=False)

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def files(self) -> list[FileRecord]:
        return [FileRecord(**entry) for entry in self.manifest["files"]]


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
    manifest = read_json(path / "manifest.json")
    kind = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if kind != (CHECKPOINT_FORMAT, CHECKPOINT_VERSION):
        raise DamagedDataError(
            f"{path} is not a checkpoint of version {CHECKPOINT_VERSION}: its manifest says {kind}"
        )
    return Checkpoint(path=path, manifest=manifest)


def fault_of_checkpoint(path: Path, *, rank: int = 0, size: int = 1) -> str | None:
    """Say what is wrong with a checkpoint, or None. Each rank hashes its share of the files."""
    try:
        records = read_checkpoint(path).files
    except (DamagedDataError, TypeError, KeyError) as error:
        return str(error)
    return next(filter(None, (fault_of_file(path, record) for record in records[rank::size])), None)


def record_and_flush(root: Path, names: Sequence[str]) -> list[FileRecord]:
    """Flush the named files to disk and take their sizes and checksums."""
    for name in names:
        flush(root / name)
    return [record_file(root, name) for name in names]


def publish_checkpoint(root: Path, step: int, fields: Mapping[str, Any], files: Sequence[FileRecord]) -> Path:
    """Turn `step-<n>.tmp`, whose files are flushed, into the checkpoint `step-<n>`, and point `latest.json`
    at it.

    Args:
        root: OUTPUT/checkpoints.
        step: optimizer steps done.
        fields: the manifest's other fields: world, zero_stage, memory, provenance, …
        files: records of everything in the directory.
    """
    final = root / checkpoint_name(step)
    temporary = final.with_name(final.name + ".tmp")
    manifest = {
        **fields,
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "step": step,
        "files": [record.to_json() for record in sorted(files, key=lambda record: record.name)],
    }
    (temporary / "manifest.json").write_bytes(sealed_json(manifest))
    for path in (
        temporary / "manifest.json",
        *(path for path in temporary.rglob("*") if path.is_dir()),
        temporary,
    ):
        flush(path)
    if (
        final.exists() and fault_of_checkpoint(final) is None
    ):  # an earlier save of the same step: the same state
        shutil.rmtree(temporary)
    else:
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        flush(root)
    publish_json(root.parent / "latest.json", {"step": step})
    return final


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it again; the user may look at it."""
    aside = path.with_name(path.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(path, aside)
    return aside


def remove_old_checkpoints(root: Path, keep: int) -> None:
    for path in list_checkpoints(root)[keep:]:
        shutil.rmtree(path)


def remove_unfinished(root: Path) -> None:
    """Remove what a killed run left half written (`*.tmp`)."""
    for path in root.glob("step-*.tmp") if root.is_dir() else ():
        shutil.rmtree(path)


def write_weights(
    writer: UnitWriter,
    weights: Mapping[str, torch.Tensor],
    *,
    memory: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write `weights/model.safetensors` and `weights/config.json` of a trained memory.

    Args:
        writer: the unit's writer of the training's stage directory.
        weights: a plain `Memory`'s state dict.
        memory: `MemoryConfig.to_dict()`.
        provenance: what the memory was made from and for; plain values.
    """
    with writer.file("weights/model.safetensors") as path:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"}
        )
        path.chmod(0o644)
    with writer.file("weights/config.json") as path:
        path.write_bytes(
            canonical_json(
                {
                    "format": f"mlpmem-{MEMORY_STAGE}",
                    "version": MEMORY_VERSION,
                    "memory": dict(memory),
                    "provenance": dict(provenance),
                }
            )
        )


@dataclass(frozen=True, kw_only=True)
class TrainedMemory:
    """A trained memory as read from disk: `memory` is a MemoryConfig's dict, `weights` a plain Memory's state
    dict."""

    sha256: str
    memory: dict[str, Any]
    provenance: dict[str, Any]
    weights: dict[str, torch.Tensor] = field(repr=False)


def read_weights(root: Path, *, flag: str = "--memory") -> TrainedMemory:
    """Read the weights that a finished training left in OUTPUT/weights.

    Raises:
        UserError: no finished training there.
        DamagedDataError: files missing, of another size or version, or unreadable.
    """
    _, sha256 = read_manifest(root, stage=MEMORY_STAGE, version=MEMORY_VERSION, flag=flag)
    config = read_json(root / "weights" / "config.json")
    if (config.get("format"), config.get("version")) != (f"mlpmem-{MEMORY_STAGE}", MEMORY_VERSION):
        raise UserError(
            f"{flag} {root}: weights/config.json is of {config.get('format')!r} version "
            f"{config.get('version')}, this program reads mlpmem-{MEMORY_STAGE} version {MEMORY_VERSION}"
        )
    try:
        weights = load_file(root / "weights" / "model.safetensors")
    except Exception as error:  # safetensors raises its own family, which is not an OSError
        raise DamagedDataError(
            f"{root}/weights/model.safetensors cannot be read ({error}): run the training again, "
            "it writes the weights from its last checkpoint"
        ) from error
    return TrainedMemory(
        sha256=sha256, memory=config["memory"], provenance=config["provenance"], weights=weights
    )
