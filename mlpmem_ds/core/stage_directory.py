"""A stage's output directory: fixed units, each published whole with a record; the manifest last. Rerunning
is resuming.

    OUTPUT/
      identity.json       what the bytes depend on: format, version, flags, hashes of the inputs; written
                          first
      run.json            the resolved flags, versions and machine of the latest start (for people; not part
                          of the result)
      done/<unit>.json    one record a unit: its files with sizes and checksums, and a summary
      manifest.json       written last, when every unit has its record: the directory is complete
      log.jsonl           events

Identity, records and manifest carry their own checksums (core/files.py), so that a damaged one is never
believed.

A unit is a pure function of (identity, unit name), so that any rank may compute it, at any time, and get the
same bytes. Ranks share nothing but the file system: no rank waits for another inside a list of units. A rank
that has made its own units makes those of the others that no rank works at (core/claims.py), so that a slow
or ended rank delays no other.

A stage is a few calls, the same on every rank:

    directory = open_stage(output, …)
    directory.run_phase(["codec"], fit)              # what the next phase reads: every rank waits for it
    directory.run_units(blocks, extract)             # no rank waits
    directory.complete(["codec", *blocks], describe) # one rank writes the manifest
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.array_files import ArrayWriter, array_file
from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.claims import claim, remove_dead_claims
from mlpmem_ds.core.config import Flags, deciding_values, default_values
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import (
    FileRecord,
    content_hash,
    fault_of_file,
    publish,
    publish_array,
    publish_json,
    read_sealed_json,
    record_file,
    remove_stale_temporaries,
)
from mlpmem_ds.core.log import EventLog, log_for_all
from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.core.run_description import IDENTITY_FIELD, describe_run, has_records, settle_identity
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.core.world import World

_logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_CHECKS = 0.2
_SECONDS_BETWEEN_WAITING_LINES = 60.0


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
        self.records.append(replace(publish_array(path, array), name=name))

    @contextlib.contextmanager
    def array_file(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[ArrayWriter]:
        """OUTPUT/name, an array that is written a few rows at a time; it appears when the block ends."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with array_file(path, shape, dtype) as rows:
            yield rows
        self.records.append(rows.record(name))


Compute = Callable[[str, UnitWriter], Mapping[str, Any] | None]
"""writes the files of the unit of this name and returns its summary"""


class StageDirectory:
    """A stage's output: its units, their records and its manifest. Made by `open_stage`, one a process."""

    def __init__(self, root: Path, identity: Mapping[str, Any], world: World) -> None:
        self.root = root
        self.identity = dict(identity)
        self._identity_sha256 = content_hash(self.identity)
        self.world = world
        self.log = EventLog(root / "log.jsonl", world)
        self._start = time.monotonic()
        self._was_complete = self.manifest_path.is_file()
        self._compute_of_unit: dict[str, Compute] = {}

    @property
    def manifest_path(self) -> Path:
        return self.root / "manifest.json"

    def record_path(self, unit: str) -> Path:
        return self.root / "done" / f"{unit}.json"

    def read_record(self, unit: str) -> dict[str, Any]:
        return read_sealed_json(self.record_path(unit))

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

    def run_phase(self, units: Sequence[str], compute: Compute) -> list[dict[str, Any]]:
        """Compute units that a later phase reads: `run_units`, then wait until all of them are complete.

        Returns their summaries. A rank that waits makes the units of one that died.
        """
        self.run_units(units, compute)
        self._wait_until_whole(units)
        return self.summaries(units)

    def run_units(self, units: Sequence[str], compute: Compute, *, take_over: bool = True) -> int:
        """Compute this rank's units that are not complete, then the others' that no rank works at; return how
        many.

        Args:
            units: every unit of this phase, in the same order on every rank.
            compute: writes a unit's files through the writer and returns its summary (plain values).
            take_over: whether any rank can compute any unit. False where `compute` works on one rank alone.
        """
        num_computed = sum(
            self._make(unit, compute)
            for unit in deal(units, self.world.rank, self.world.size)
            if self.fault_of_unit(unit) is not None
        )
        if take_over:
            self._compute_of_unit.update(dict.fromkeys(units, compute))
            num_computed += sum(
                self._make(unit, compute, taken_over=True) for unit in self._without_record(units)
            )
        return num_computed

    def _without_record(self, units: Sequence[str]) -> Iterator[str]:
        """The others' units that have no record: each rank's last one first, for it gets there last."""
        recorded = (
            {entry.name for entry in os.scandir(self.root / "done")}
            if (self.root / "done").is_dir()
            else set()
        )
        rank, size = self.world.rank, self.world.size
        missing = [
            [
                unit
                for unit in reversed(deal(units, (rank + step) % size, size))
                if f"{unit}.json" not in recorded
            ]
            for step in range(1, size)
        ]
        for row in itertools.zip_longest(*missing):
            yield from (unit for unit in row if unit is not None and not self.record_path(unit).is_file())

    def _make(
        self,
        unit: str,
        compute: Compute,
        *,
        taken_over: bool = False,
    ) -> bool:
        """Compute and publish one unit; False where another process is at it, or has just made it."""
        self.record_path(unit).parent.mkdir(exist_ok=True)
        with claim(self._claim_path(unit)) as is_mine:
            if not is_mine:
                return False
            if self.record_path(unit).exists():
                fault = self.fault_of_unit(unit)
                if fault is None:
                    return False
                _logger.warning("%s: making the unit again", fault)
                # Not complete meanwhile, for readers and for the other ranks, one of which may be about to
                # finish.
                os.replace(self.record_path(unit), self._former_path(unit))
            self.manifest_path.unlink(missing_ok=True)
            former = self._former_files(unit)
            writer = UnitWriter(self.root)
            start = time.monotonic()
            summary = compute(unit, writer)
            self._refuse_other_bytes(unit, former, writer.records)
            self._publish_record(unit, writer.records, summary or {})
            self._former_path(unit).unlink(missing_ok=True)
        seconds = round(time.monotonic() - start, 3)
        self.log.write("unit", unit=unit, seconds=seconds, **({"taken_over": True} if taken_over else {}))
        return True

    def _claim_path(self, unit: str) -> Path:
        return self.root / "done" / f".{unit}.claim"

    def _former_path(self, unit: str) -> Path:
        """The record of a unit that was found damaged, until it is made again."""
        return self.root / "done" / f".{unit}.former"

    def _former_files(self, unit: str) -> list[FileRecord] | None:
        """The files of a unit's earlier record; None where there is none that can be read."""
        try:
            return [FileRecord(**entry) for entry in read_sealed_json(self._former_path(unit))["files"]]
        except (DamagedDataError, KeyError, TypeError):
            return None

    def _refuse_other_bytes(
        self, unit: str, former: Sequence[FileRecord] | None, files: Sequence[FileRecord]
    ) -> None:
        """A damaged unit must come out as it was: other units may have been made from it.

        Raises:
            DamagedDataError: it was made with other bytes (another machine, library or number of threads).
        """
        if former is not None and list(former) != list(files):
            raise DamagedDataError(
                f"unit {unit} of {self.root} was damaged and has other bytes when made again, so the other"
                " units may not fit it (another machine or number of threads?): remove the directory and run"
                " again"
            )

    def _publish_record(self, unit: str, files: Sequence[FileRecord], summary: Mapping[str, Any]) -> None:
        path = self.record_path(unit)
        path.parent.mkdir(exist_ok=True)
        record = {
            "unit": unit,
            "files": [file.to_json() for file in files],
            "summary": dict(summary),
            IDENTITY_FIELD: self._identity_sha256,
        }
        publish_json(path, record, seal=True)

    def _wait_until_whole(self, units: Sequence[str]) -> None:
        """Every unit with its record, and every file with its checksum."""
        self._wait_while_missing(units, lambda unit: self.fault_of_unit(unit) is not None)

    def _wait_while_missing(self, units: Sequence[str], is_missing: Callable[[str], bool]) -> None:
        last_line, missing = time.monotonic(), list(units)
        while missing := [unit for unit in missing if is_missing(unit)]:
            claimable = [unit for unit in missing if unit in self._compute_of_unit]
            if any(self._make(unit, self._compute_of_unit[unit], taken_over=True) for unit in claimable):
                continue
            if time.monotonic() - last_line > _SECONDS_BETWEEN_WAITING_LINES:
                last_line = time.monotonic()
                _logger.warning(
                    "rank %d waits for %d units that other ranks compute, the first is %s",
                    self.world.rank,
                    len(missing),
                    missing[0],
                )
            time.sleep(_SECONDS_BETWEEN_CHECKS)

    def remove_stale_files(self) -> None:
        """Remove temporary files and claims of processes that were killed."""
        remove_stale_temporaries(self.root)
        for folder in (self.root, self.root / "done"):
            remove_dead_claims(folder)

    def summaries(self, units: Sequence[str]) -> list[dict[str, Any]]:
        return [self.read_record(unit)["summary"] for unit in units]

    def complete(
        self,
        units: Sequence[str],
        describe: Callable[[], Manifest | Mapping[str, Any]],
        *,
        afterwards: Callable[[], None] | None = None,
        wait: bool = False,
    ) -> None:
        """Publish the manifest when every unit has its record. One rank does it: the one that gets there
        last, or rank 0 where the directory was complete before.

        Units that live ranks compute are waited for, and made here if those ranks die: as long as one rank
        lives, the directory is completed.

        Args:
            units: every unit of every phase.
            describe: the stage's own manifest fields, made from the units' summaries; called when all are
                complete, on the rank that publishes.
            afterwards: called on that rank when the directory is complete.
            wait: return only when the directory is complete and every file has its checksum, on every rank:
                for what all ranks do with it next.
        """
        computable = [unit for unit in units if unit in self._compute_of_unit]
        self._wait_while_missing(computable, lambda unit: not self.record_path(unit).is_file())
        self.log.write("finished", seconds=self._seconds())
        self._publish_manifest(units, describe, afterwards)
        if wait:
            self._wait_until_whole(units)
            while not self.manifest_path.is_file():  # another rank writes it, or has died
                self._publish_manifest(units, describe, afterwards)
                time.sleep(_SECONDS_BETWEEN_CHECKS)

    def _publish_manifest(
        self,
        units: Sequence[str],
        describe: Callable[[], Manifest | Mapping[str, Any]],
        afterwards: Callable[[], None] | None,
    ) -> None:
        if not all(self.record_path(unit).is_file() for unit in units):
            return
        with claim(self.root / ".manifest.claim") as is_mine:
            is_done = self.manifest_path.is_file() and not (self._was_complete and self.world.is_first)
            if is_done or not is_mine:
                return
            files = [file for unit in units for file in self.read_record(unit)["files"]]
            manifest = {**self.identity, **to_json(describe()), "files": files}
            publish_json(self.manifest_path, manifest, seal=True)
            self.remove_stale_files()
        log_for_all(_logger, self.world, "complete: %s (%.1f s)", self.root, self._seconds())
        if afterwards is not None:
            afterwards()

    def _seconds(self) -> float:
        return round(time.monotonic() - self._start, 3)


def open_stage(
    output: Path,
    *,
    stage: str,
    version: int,
    config: Flags,
    inputs: Mapping[str, str],
    world: World,
    resolved: Mapping[str, Any] | None = None,
    flags: Collection[str] | None = None,
) -> StageDirectory:
    """Open or make a stage's output directory, refusing one that holds something else. Check the inputs
    before this.

    Only flags that differ from their defaults bind a directory, so that a new flag never breaks an old one.
    Whoever changes a default, or what it makes, raises the format's version.

    Args:
        output: the directory.
        stage: format name, such as "keys".
        version: format version.
        config: the command's Config; the values that decide the bytes become part of the identity.
        inputs: name → hash of each input (manifest checksums, model fingerprints).
        resolved: what the stage made of each flag of identity "resolved", all of them and no others.
        flags: those that decide this directory, where one command writes several; None = all.

    Raises:
        UserError: the directory holds files that are not this stage's, or a run with other inputs or flags.
    """
    identity = {
        "format": f"mlpmem-{stage}",
        "version": version,
        "inputs": dict(inputs),
        "config": deciding_values(config, resolved or {}, flags=flags),
    }
    check_output(output, stage=stage)
    settle_identity(output, identity, defaults=default_values(type(config)))
    if world.is_first:
        _remove_damaged_manifest(output)
    directory = StageDirectory(output, identity, world)
    if world.is_first:
        directory.remove_stale_files()
        publish_json(output / "run.json", describe_run(config, world))
    directory.log.write("started", world=world.size)
    return directory


def _remove_damaged_manifest(output: Path) -> None:
    """Take a manifest away that cannot be believed: it is made from the records, which are whole."""
    path = output / "manifest.json"
    try:
        if path.is_file():
            read_sealed_json(path)
    except DamagedDataError as error:
        _logger.warning("%s: writing it anew", error)
        path.unlink(missing_ok=True)


def check_output(output: Path, *, stage: str) -> bool:
    """Whether a run was begun there; for callers that do long work before `open_stage`.

    Raises:
        UserError: it is a file, or holds something that is no stage's.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: choose a directory")
    # Listed once: other ranks are starting too.
    names = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    if "identity.json" in names or has_records(output):
        _refuse_other_format(output, stage)
        return True
    if any(not name.startswith(".") for name in names):
        raise UserError(
            f"--output {output} is not empty and holds no {stage}: choose a new directory or empty it"
        )
    return False


def _refuse_other_format(output: Path, stage: str) -> None:
    with contextlib.suppress(
        DamagedDataError, FileNotFoundError
    ):  # what is damaged is judged with the whole identity
        found = read_sealed_json(output / "identity.json")
        if found.get("format") != f"mlpmem-{stage}":
            raise UserError(
                f"--output {output} holds {found.get('format')}, not mlpmem-{stage}: choose another directory"
            )
