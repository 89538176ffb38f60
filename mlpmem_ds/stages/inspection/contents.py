"""Part of `inspect_run`: the stages, checkpoints and exports in a run directory, checked against their
records.

Every file is compared with the size and checksum in its record, by several threads (hashing releases Python's
lock). A fault names its file and its unit, for a unit is what the stage makes again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlpmem_ds.core.config import default_values
from mlpmem_ds.core.directories import folders_with
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.file_lists import files_of
from mlpmem_ds.core.files import FileRecord, fault_of_file, read_json, read_sealed_json, sha256_of_file
from mlpmem_ds.core.manifest import MARKS_OF_OURS
from mlpmem_ds.core.objects.contents import CHECKPOINTS
from mlpmem_ds.formats.checkpoint import list_checkpoints
from mlpmem_ds.formats.corpus import read_corpus_manifest
from mlpmem_ds.stages.keys.config import Config as KeysConfig
from mlpmem_ds.stages.keys.plan import UNIT_POSITIONS, blocks_of_units

EXPORT_FILE = "mlpmem_export.json"
Kind = Literal["stage", "checkpoint", "export"]
_REMEDIES: Mapping[Kind, str] = {
    "stage": "run its stage again with the same flags, it remakes only what is damaged",
    "checkpoint": "remove it, training continues from the newest that is whole",
    "export": "convert again into a new directory",
}


@dataclass(frozen=True, kw_only=True)
class StageState:
    """What was found in one directory."""

    root: Path
    name: str
    """its path below the run directory"""
    kind: Kind
    format: str
    has_manifest: bool
    files: tuple[tuple[str | None, FileRecord], ...]
    """(unit, file) of each file that was published; the unit is None where a kind has none"""
    num_units: int
    missing: tuple[str, ...]
    """units that belong to the stage and have not been made"""
    notes: tuple[str, ...]
    """remarks that are no faults"""
    faults: tuple[str, ...]
    sha256: str | None
    """of the manifest; None where there is none"""
    inputs: dict[str, str]
    settings: dict[str, Any]

    @property
    def is_complete(self) -> bool:
        return self.has_manifest and not self.faults

    @property
    def num_bytes(self) -> int:
        return sum(record.bytes for _, record in self.files)

    @property
    def remedy(self) -> str:
        return _REMEDIES[self.kind]

    def line(self) -> str:
        state = "damaged" if self.faults else "complete" if self.has_manifest else "not complete"
        faults = f", {len(self.faults)} faults" if self.faults else ""
        units = f", {self.num_units:,} units" if self.kind == "stage" else ""
        size = f"{len(self.files):6,} files {self.num_bytes / 1e6:12,.1f} MB"
        return f"{self.name:36} {self.format:20} {state:13} {size}{units}{faults}"

    def to_json(self) -> dict[str, Any]:
        return {
            "root": str(self.root),
            "name": self.name,
            "format": self.format,
            "complete": self.is_complete,
            "files": len(self.files),
            "bytes": self.num_bytes,
            "units": self.num_units,
            "missing": list(self.missing),
            "notes": list(self.notes),
            "faults": list(self.faults),
            "inputs": self.inputs,
            "sha256": self.sha256,
        }


def find_directories(run: Path) -> tuple[list[Path], list[Path]]:
    """(stages, exports) at or below `run`, each in the order of the paths.

    Raises:
        OSError: a folder cannot be read; one of them may lie there.
    """
    folders = dict(sorted(folders_with(run, MARKS_OF_OURS)))
    stages = [
        folder
        for folder, names in folders.items()
        if "identity.json" in names or ("manifest.json" in names and (folder / "done").is_dir())
    ]
    return stages, [folder for folder, names in folders.items() if EXPORT_FILE in names]


def read_run(run: Path, *, checksums: bool, threads: int | None = None) -> list[StageState]:
    """Everything of ours at or below `run`, in the order of the paths.

    Args:
        run: a run directory, or one stage's, checkpoint's or export's.
        checksums: read every file; if False, compare sizes only.
        threads: that read and hash at once; default: one a core, at most eight.
    """
    stages, exports = find_directories(run)
    states = [_read_stage(run, root) for root in stages]
    for owner in [run, *(state.root for state in states)]:
        states += [_read_checkpoint(run, path) for path in sorted(list_checkpoints(owner / CHECKPOINTS))]
    if run.name.startswith("step-") and (run / "manifest.json").is_file():
        states.append(_read_checkpoint(run, run))
    states += [_read_export(run, root) for root in exports]
    states = sorted({state.root: state for state in states}.values(), key=lambda state: state.root)
    states = [replace(state, missing=_missing_units(state, states)) for state in states]
    return _check_files(states, checksums=checksums, threads=threads or min(8, os.cpu_count() or 1))


def _check_files(states: Sequence[StageState], *, checksums: bool, threads: int) -> list[StageState]:
    def fault_of(place: tuple[StageState, str | None, FileRecord]) -> str | None:
        state, unit, record = place
        try:
            fault = fault_of_file(state.root, record, checksum=checksums)
        except OSError as error:  # the others are checked all the same
            fault = f"{state.root / record.name} cannot be read ({error.strerror or error})"
        return f"unit {unit}: {fault}" if fault and unit is not None else fault

    places = [(state, unit, record) for state in states for unit, record in state.files]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(fault_of, places))
    faults_of: dict[Path, list[str]] = {}
    for (state, _, _), fault in zip(places, found, strict=True):
        if fault:
            faults_of.setdefault(state.root, []).append(fault)
    return [replace(state, faults=(*state.faults, *faults_of.get(state.root, ()))) for state in states]


def _read_stage(run: Path, root: Path) -> StageState:
    """One stage's directory: its manifest, and its units' records, which must agree."""
    faults: list[str] = []
    identity = _read(root / "identity.json", faults)
    has_manifest = (root / "manifest.json").is_file()
    manifest = _read(root / "manifest.json", faults) if has_manifest else {}
    files: list[tuple[str | None, FileRecord]] = []
    records = sorted((root / "done").rglob("*.json"))
    for path in records:
        if not path.name.startswith("."):
            files += [(path.stem, record) for record in _records(_read(path, faults), path, faults)]
    if has_manifest:
        listed, made = (
            set(_listed(manifest, root, faults)),
            {record for _, record in files},
        )
        files += [(None, record) for record in sorted(listed - made, key=lambda record: record.name)]
        faults += [
            f"{root / record.name} has a record that is not in the manifest"
            for record in made - listed
            if manifest
        ]
        if len(listed - made) > 0 and not faults:
            faults.append(
                f"records of {len(listed - made)} files that the manifest names are missing in"
                f" {root / 'done'}"
            )
        faults += [
            f"{root}: identity.json and manifest.json disagree on {name}"
            for name in ("format", "version", "inputs", "config")
            if manifest and identity and manifest.get(name) != identity.get(name)
        ]
    return StageState(
        root=root,
        name=_name(run, root),
        kind="stage",
        format=str(identity.get("format") or manifest.get("format") or "?"),
        has_manifest=has_manifest,
        files=tuple(files),
        num_units=len(records),
        missing=(),
        notes=tuple(_leftovers(root)),
        faults=tuple(faults),
        sha256=sha256_of_file(root / "manifest.json") if has_manifest else None,
        inputs=dict(identity.get("inputs", {})),
        settings=dict(identity.get("config", {})),
    )


def _read_checkpoint(run: Path, root: Path) -> StageState:
    return _read_listed(run, root, root / "manifest.json", "checkpoint", "mlpmem-checkpoint")


def _read_export(run: Path, root: Path) -> StageState:
    return _read_listed(run, root, root / EXPORT_FILE, "export", "mlpmem-export")


def _read_listed(run: Path, root: Path, path: Path, kind: Kind, expected: str) -> StageState:
    """A directory that is described by one file with a list of the others."""
    faults: list[str] = []
    manifest = _read(path, faults) if path.is_file() else {}
    if not path.is_file():
        faults.append(f"{path} is missing")
    elif manifest and manifest.get("format") != expected:
        faults.append(f"{path} says {manifest.get('format')!r} where {expected!r} is expected")
    return StageState(
        root=root,
        name=_name(run, root),
        kind=kind,
        format=expected,
        has_manifest=path.is_file(),
        files=tuple((None, record) for record in (_records(manifest, path, faults) if manifest else ())),
        num_units=0,
        missing=(),
        notes=(),
        faults=tuple(faults),
        sha256=sha256_of_file(path) if path.is_file() else None,
        inputs={name: value for name, value in manifest.get("inputs", {}).items() if isinstance(value, str)},
        settings={},
    )


def _read(path: Path, faults: list[str]) -> dict[str, Any]:
    """Read a sealed JSON object; if it is damaged, return {} and add a fault."""
    try:
        return read_sealed_json(path)
    except DamagedDataError as error:
        faults.append(str(error))
    return {}


def _records(found: Mapping[str, Any], path: Path, faults: list[str]) -> list[FileRecord]:
    if not found:
        return []
    try:
        return [FileRecord(**entry) for entry in found["files"]]
    except (KeyError, TypeError, ValueError):
        faults.append(f"{path} is damaged: its list of files cannot be read")
        return []


def _listed(manifest: Mapping[str, Any], root: Path, faults: list[str]) -> list[FileRecord]:
    """The files that a manifest names, itself or in its lists."""
    try:
        return list(files_of(manifest, root)) if manifest else []
    except DamagedDataError as error:
        faults.append(str(error).partition("; run")[0])
        return []


def _leftovers(root: Path) -> Iterator[str]:
    """Traces of killed or running processes, damaged audits, and damaged checkpoints that were renamed."""
    if (root / "audit.json").is_file():
        try:
            read_json(root / "audit.json")
        except DamagedDataError as error:
            yield (
                f"{error} (with the --audit of extract_keys or write_targets), or remove it: nothing else"
                " needs it"
            )
    temporaries = sum(1 for path in root.rglob(".*.tmp") if path.is_file())
    if temporaries:
        yield (
            f"{temporaries} temporary files of running or killed processes (the next start removes the"
            " latter; those of another host, or of before a restart of it, when no process has written to"
            " them for an hour, or at the end)"
        )
    if claims := sorted(path.name[1:].removesuffix(".claim") for path in (root / "done").rglob(".*.claim")):
        yield f"{len(claims)} units claimed by running or killed processes: {some(claims)}"
    for path in sorted((root / CHECKPOINTS).glob("step-*.damaged")):
        yield f"{path.name} was found damaged and renamed: remove it if you do not need it"


def _missing_units(state: StageState, states: Sequence[StageState]) -> tuple[str, ...]:
    """The units of a key directory that have not been made; () if its corpus is not in the run."""
    if state.has_manifest or state.format != "mlpmem-keys":
        return ()
    corpora = [other for other in states if other.sha256 and other.sha256 == state.inputs.get("corpus")]
    if not corpora:
        return ()
    made = {unit for unit, _ in state.files}
    flags = default_values(KeysConfig) | state.settings
    codec = ["codec"] if flags["codec"] == "int8" else []
    try:
        num_positions = read_corpus_manifest(corpora[0].root).num_counted(flags["split"])
    except UserError:  # named with the corpus itself
        return ()
    blocks = blocks_of_units(num_positions, flags["unit_positions"] or UNIT_POSITIONS)
    return tuple(unit for unit in [*codec, *blocks] if unit not in made)


def some(names: Sequence[str]) -> str:
    """The first few of a long list."""
    return ", ".join(names[:3]) + (f", … ({len(names):,} in all)" if len(names) > 3 else "")


def _name(run: Path, root: Path) -> str:
    return run.name if root == run else root.relative_to(run).as_posix()
