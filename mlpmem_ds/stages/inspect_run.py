"""Look at a run directory: which stages are there, whether each is complete, and whether every checksum holds."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord, fault_of_file, read_json, sha256_of_file
from mlpmem_ds.core.world import World

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to look at."""

    run: Path = option("run directory, or one stage's directory", metavar="RUN")
    checksums: bool = option("read every file and compare its checksum; without, sizes only", True)
    output: Path | None = option("also write what was found to this JSON file", None, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class StageState:
    """What was found in one stage's directory."""

    root: Path
    format: str
    is_complete: bool
    num_files: int
    num_bytes: int
    faults: tuple[str, ...]
    sha256: str | None
    """of the manifest; None where there is none"""
    inputs: dict[str, str]

    def line(self) -> str:
        state = "complete" if self.is_complete else "not complete"
        faults = f", {len(self.faults)} faults" if self.faults else ""
        size = f"{self.num_files:6,} files {self.num_bytes / 1e6:12,.1f} MB"
        return f"{self.root.name:24} {self.format:20} {state:13} {size}{faults}"


def run(config: Config, world: World) -> None:
    """Report on every stage below `config.run`.

    Raises:
        UserError: nothing of ours is there.
        DamagedDataError: something is damaged; the message lists it. (Not complete is not damaged.)
    """
    if not config.run.is_dir():
        raise UserError(f"{config.run} is not a directory: give a run directory, such as the demo's --run")
    states = [
        inspect_stage(path.parent, checksums=config.checksums) for path in sorted(config.run.rglob("identity.json"))
    ]
    if not states:
        raise UserError(f"{config.run} holds no stage of ours (no identity.json below it): give a run directory")
    for state in states:
        _logger.info(state.line())
        for fault in state.faults:
            _logger.warning("  %s", fault)
    notes = [note for state in states for note in _broken_links(state, states)]
    for note in notes:
        _logger.warning(note)
    if config.output is not None:
        config.output.write_text(json.dumps([_to_json(state) for state in states], indent=1) + "\n", encoding="utf-8")
    if damaged := [state for state in states if state.faults]:
        shown = "; ".join(state.faults[0] for state in damaged)
        raise DamagedDataError(
            f"{sum(len(state.faults) for state in damaged)} faults in {len(damaged)} stages ({shown}): "
            "run those stages again with the same flags, they remake only what is damaged"
        )


def inspect_stage(root: Path, *, checksums: bool) -> StageState:
    """Check one stage's directory against its manifest, or against its units' records where it is not complete."""
    faults: list[str] = []
    try:
        identity = read_json(root / "identity.json")
    except DamagedDataError as error:
        return StageState(
            root=root,
            format="?",
            is_complete=False,
            num_files=0,
            num_bytes=0,
            faults=(str(error),),
            sha256=None,
            inputs={},
        )
    manifest_path = root / "manifest.json"
    entries: list[dict[str, Any]] = []
    try:
        if manifest_path.is_file():
            entries = read_json(manifest_path)["files"]
        else:
            entries = [entry for path in sorted((root / "done").glob("*.json")) for entry in read_json(path)["files"]]
    except (DamagedDataError, KeyError) as error:
        faults.append(f"{root}: a manifest or record is damaged ({error})")
    records = [FileRecord(**entry) for entry in entries]
    faults += [fault for record in records if (fault := fault_of_file(root, record, checksum=checksums))]
    return StageState(
        root=root,
        format=identity.get("format", "?"),
        is_complete=manifest_path.is_file() and not faults,
        num_files=len(records),
        num_bytes=sum(record.bytes for record in records),
        faults=tuple(faults),
        sha256=sha256_of_file(manifest_path) if manifest_path.is_file() else None,
        inputs=identity.get("inputs", {}),
    )


def _broken_links(state: StageState, states: list[StageState]) -> list[str]:
    """Inputs of a stage that are here, but were remade with other content since."""
    here = {
        other.format.removeprefix("mlpmem-"): {one.sha256 for one in states if one.format == other.format}
        for other in states
    }
    return [
        f"{state.root.name}: its {name} is not the one in this run directory (remade since?)"
        for name, sha256 in state.inputs.items()
        if name in here and sha256 not in here[name]
    ]


def _to_json(state: StageState) -> dict[str, Any]:
    return {
        "root": str(state.root),
        "format": state.format,
        "complete": state.is_complete,
        "files": state.num_files,
        "bytes": state.num_bytes,
        "faults": list(state.faults),
        "inputs": state.inputs,
        "sha256": state.sha256,
    }
