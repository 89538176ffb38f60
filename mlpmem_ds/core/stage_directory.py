"""A stage's output directory: fixed units, each published whole with a record; the manifest last. Rerunning is resuming.

    OUTPUT/
      identity.json       what the bytes depend on: format, version, flags, hashes of the inputs; written first
      run.json            the resolved flags, versions and machine of the latest start (for people; not part of the result)
      done/<unit>.json    one record a unit: its files with sizes and checksums, and a summary
      manifest.json       written last, when every unit has its record: the directory is complete
      log.jsonl           events

A unit is a pure function of (identity, unit name), so that any rank may compute it, at any time, and get the same
bytes. Ranks share nothing but the file system: no rank waits for another inside a list of units.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import mlpmem_ds
from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.config import identity_values, plain_values
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import (
    FileRecord,
    fault_of_file,
    publish,
    publish_array,
    publish_json,
    read_json,
    record_file,
    remove_stale_temporaries,
    sha256_of_file,
)
from mlpmem_ds.core.log import EventLog
from mlpmem_ds.core.world import World

_logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_WAITING_LINES = 60.0
_VERSIONED_PACKAGES = ("torch", "transformers", "deepspeed", "faiss-cpu", "webdataset", "zstandard", "numpy")


class UnitWriter:
    """Publishes the files of one unit and remembers their records."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.records: list[FileRecord] = []

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A temporary path that becomes OUTPUT/name when the block ends."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish(path) as temporary:
            yield temporary
        self.records.append(record_file(self._root, name))

    def array(self, name: str, array: np.ndarray) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_array(path, array)
        self.records.append(record_file(self._root, name))


class StageDirectory:
    """See the module's text. Made by `open_stage`; one per process and stage."""

    def __init__(self, root: Path, identity: Mapping[str, Any], world: World) -> None:
        self.root = root
        self.identity = dict(identity)
        self.world = world
        self.log = EventLog(root / "log.jsonl", world)
        self._start = time.monotonic()

    @property
    def manifest_path(self) -> Path:
        return self.root / "manifest.json"

    def record_path(self, unit: str) -> Path:
        return self.root / "done" / f"{unit}.json"

    def read_record(self, unit: str) -> dict[str, Any]:
        return read_json(self.record_path(unit))

    def fault_of_unit(self, unit: str) -> str | None:
        """Say why a unit is not complete, or None: no record, or a file that does not match it."""
        if not self.record_path(unit).is_file():
            return f"unit {unit} has not been made"
        try:
            record = self.read_record(unit)
            files = [FileRecord(**entry) for entry in record["files"]]
        except (DamagedDataError, KeyError, TypeError):
            return f"the record of unit {unit} is damaged"
        return next(filter(None, (fault_of_file(self.root, file) for file in files)), None)

    def run_units(self, units: Sequence[str], compute: Callable[[str, UnitWriter], Mapping[str, Any] | None]) -> int:
        """Compute those of this rank's units that are not complete; return how many were computed.

        Args:
            units: every unit of this phase, in the same order on every rank.
            compute: writes a unit's files through the writer and returns its summary (plain values).
        """
        mine = deal(units, self.world.rank, self.world.size)
        num_computed = 0
        for unit in mine:
            fault = self.fault_of_unit(unit)
            if fault is None:
                continue
            former = self._former_files(unit)
            if self.record_path(unit).exists():
                _logger.warning("%s: making the unit again", fault)
                self.manifest_path.unlink(missing_ok=True)  # so that nobody reads the directory meanwhile
            writer = UnitWriter(self.root)
            start = time.monotonic()
            summary = compute(unit, writer)
            self._refuse_other_bytes(unit, former, writer.records)
            self._publish_record(unit, writer.records, summary or {})
            self.log.write("unit", unit=unit, seconds=round(time.monotonic() - start, 3))
            num_computed += 1
        return num_computed

    def _former_files(self, unit: str) -> list[FileRecord] | None:
        """The files of a unit's earlier record; None where there is none that can be read."""
        try:
            return [FileRecord(**entry) for entry in self.read_record(unit)["files"]]
        except (DamagedDataError, KeyError, TypeError):
            return None

    def _refuse_other_bytes(self, unit: str, former: Sequence[FileRecord] | None, files: Sequence[FileRecord]) -> None:
        """A damaged unit must come out as it was: other units may have been made from it.

        Raises:
            DamagedDataError: it came out different (another machine, library or number of threads).
        """
        if former is not None and list(former) != list(files):
            raise DamagedDataError(
                f"unit {unit} of {self.root} was damaged and came out different when made again, so the other units may not "
                "fit it (another machine or number of threads?): remove the directory and run again"
            )

    def _publish_record(self, unit: str, files: Sequence[FileRecord], summary: Mapping[str, Any]) -> None:
        path = self.record_path(unit)
        path.parent.mkdir(exist_ok=True)
        publish_json(path, {"unit": unit, "files": [file.to_json() for file in files], "summary": dict(summary)})

    def wait_for(self, units: Sequence[str]) -> None:
        """Wait until every unit of an earlier phase has its record (other ranks make them)."""
        last_line = time.monotonic()
        while missing := [unit for unit in units if self.fault_of_unit(unit)]:
            if time.monotonic() - last_line > _SECONDS_BETWEEN_WAITING_LINES:
                last_line = time.monotonic()
                _logger.warning(
                    "rank %d waits for %d units, the first is %s", self.world.rank, len(missing), missing[0]
                )
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def summaries(self, units: Sequence[str]) -> list[dict[str, Any]]:
        return [self.read_record(unit)["summary"] for unit in units]

    def finish(self, units: Sequence[str], describe: Callable[[], Mapping[str, Any]]) -> bool:
        """Publish the manifest if every unit has its record; the rank that completes the last one does it.

        Returns whether this rank is the one to speak of it: that one, or rank 0 where it was complete before.

        Args:
            units: every unit of every phase.
            describe: the stage's own manifest fields, made from the units' summaries; called only when complete.
        """
        seconds = round(time.monotonic() - self._start, 3)
        was_complete = self.manifest_path.is_file()
        self.log.write("finished", seconds=seconds)
        if not all(self.record_path(unit).is_file() for unit in units):
            return False
        files = [file for unit in units for file in self.read_record(unit)["files"]]
        manifest = {**self.identity, **describe(), "files": files}
        publish_json(self.manifest_path, manifest)
        if was_complete and not self.world.is_first:
            return False
        _logger.info("complete: %s (%.1f s)", self.root, seconds)
        return True


def open_stage(
    output: Path,
    *,
    stage: str,
    version: int,
    config: Any,
    inputs: Mapping[str, str],
    world: World,
    extra: Mapping[str, Any] | None = None,
) -> StageDirectory:
    """Open or make a stage's output directory, refusing one that holds something else. Check the inputs before this.

    Args:
        output: the directory.
        stage: format name, such as "keys".
        version: format version.
        config: the stage's Config; its identity fields become part of the identity.
        inputs: name → hash of each input (manifest checksums, model fingerprints).
        extra: resolved values that decide the bytes but are not flags.

    Raises:
        UserError: the directory holds files that are not this stage's, or a run with other inputs or flags.
    """
    identity = {
        "format": f"mlpmem-{stage}",
        "version": version,
        "inputs": dict(inputs),
        "config": {**identity_values(config), **(extra or {})},
    }
    identity_path = output / "identity.json"
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: choose a directory")
    names = (
        {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    )  # once: other ranks are starting too
    if identity_path.name in names:
        _refuse_other_run(output, read_json(identity_path), identity)
    elif any(not name.startswith(".") for name in names):
        raise UserError(f"--output {output} is not empty and holds no {stage}: choose a new directory or empty it")
    output.mkdir(parents=True, exist_ok=True)
    if not identity_path.is_file():
        publish_json(identity_path, identity)
    directory = StageDirectory(output, identity, world)
    if world.is_first:
        remove_stale_temporaries(output)
        publish_json(output / "run.json", _describe_run(config, world))
    directory.log.write("started", world=world.size)
    return directory


def _refuse_other_run(output: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differences = [f"{name} was {old!r}, now {new!r}" for name, old, new in _differences(found, wanted)]
    if differences:
        raise UserError(
            f"--output {output} already holds another run ({'; '.join(differences)}): "
            "choose another --output, or remove it to start anew"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in sorted(set(found) | set(wanted)):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
    elif found != wanted:
        yield name, found, wanted


def _describe_run(config: Any, world: World) -> dict[str, Any]:
    versions = {"mlpmem_ds": mlpmem_ds.__version__, "python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "config": plain_values(config),
        "versions": versions,
        "world": world.size,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


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
        raise UserError(f"{flag} {root} does not exist")
    if not path.is_file():
        state = (
            "is not complete: run its stage again, it continues"
            if (root / "identity.json").is_file()
            else f"is not a directory of mlpmem {stage}"
        )
        raise UserError(f"{flag} {root} {state}")
    manifest = read_json(path)
    if manifest.get("format") != f"mlpmem-{stage}":
        raise UserError(f"{flag} {root} holds {manifest.get('format')!r}, not mlpmem-{stage}")
    if manifest.get("version") != version:
        raise DamagedDataError(
            f"{flag} {root} has version {manifest.get('version')}, this program reads {version}: "
            "use the release that wrote it, or remake it"
        )
    for entry in manifest["files"]:
        if fault := fault_of_file(root, FileRecord(**entry), checksum=False):
            raise DamagedDataError(f"{fault}: run the stage that made {root} again, it remakes only what is damaged")
    return manifest, sha256_of_file(path)


def require_free_bytes(path: Path, needed: int, *, what: str) -> None:
    """Refuse to start where the disk cannot hold the result.

    Raises:
        UserError: with both numbers.
    """
    existing = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{what} need {needed / 1e9:.2f} GB, and {existing} has {free / 1e9:.2f} GB free: "
            "free some space or choose another --output"
        )
