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

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.claims import ClaimWatch, claim, holder, remove_dead_claims
from mlpmem_ds.core.config import Flags, deciding_values, default_values
from mlpmem_ds.core.dealing import Dealer, DealtUnits, free_units
from mlpmem_ds.core.file_lists import list_files
from mlpmem_ds.core.files import content_hash, publish_json, sha256_of_file
from mlpmem_ds.core.log import EventLog, log_for_all
from mlpmem_ds.core.manifest import Manifest, remove_damaged_manifest
from mlpmem_ds.core.once import remove_computed
from mlpmem_ds.core.run_description import check_output, describe_run, settle_identity
from mlpmem_ds.core.temporaries import remove_stale_temporaries
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.core.unit_maker import Compute, UnitMaker
from mlpmem_ds.core.unit_records import UnitRecords, missing_of
from mlpmem_ds.core.waiting import Patience, wait_for_units
from mlpmem_ds.core.world import World

_logger = logging.getLogger(__name__)
_SECONDS_AT_THE_END = 60.0


class StageDirectory:
    """A stage's output: its units, their records and its manifest. Made by `open_stage`, one a process.

    Who compares files with their checksums: the rank that makes a unit takes them as it writes. When a
    stage is started again, each rank compares the files of the units that it is dealt, once, and notes it
    in the records; a rank that waits for those units believes the records (`UnitRecords.is_trusted`).
    Readers of a complete directory compare a file when they first read it (core/manifest.py).
    """

    def __init__(
        self, root: Path, identity: Mapping[str, Any], world: World, dealer: Dealer | None = None
    ) -> None:
        self.root = root
        self._dealer = dealer if dealer is not None and 1 < dealer.size == world.size else None
        self._num_dealt = 0
        self._dealt: DealtUnits | None = None  # of the latest list that a counter deals
        self.identity = dict(identity)
        self.world = world
        self.identity_sha256 = sha256 = content_hash(self.identity)
        self.records = UnitRecords(root, sha256)
        self._counter = f"{root.name}-{sha256[:8]}"  # of this directory among those of a command
        self.log = EventLog(root / "log.jsonl", world)
        self._maker = UnitMaker(root, self.records, self.log)
        self._start = time.monotonic()
        self._was_complete = self.manifest_path.is_file()
        self._compute_of_unit: dict[str, Compute] = {}
        self._summaries: dict[str, dict[str, Any]] = {}  # while a manifest is described

    @property
    def manifest_path(self) -> Path:
        return self.root / "manifest.json"

    def run_phase(self, units: Sequence[str], compute: Compute) -> list[dict[str, Any]]:
        """Compute units that a later phase reads: `run_units`, then wait until all of them are complete.

        Returns their summaries. A rank that waits makes the units of one that died. It compares the sizes of
        the others' files and reads none of them.
        """
        self.run_units(units, compute, read_here=True)
        if self._dealer is not None:
            self._dealer.wait()  # no rank polls; what follows finds all done
        self._wait(units, until_whole=True)
        return self.summaries(units)

    def run_units(
        self, units: Sequence[str], compute: Compute, *, take_over: bool = True, read_here: bool = False
    ) -> int:
        """Compute this rank's units that are not complete, then the others' that no rank works at; return how
        many. Ranks with a dealer take the next unit from its counter instead, without claims and listings.

        Args:
            units: every unit of this phase, in the same order on every rank.
            compute: writes a unit's files through the writer and returns its summary (plain values).
            take_over: whether any rank can compute any unit. False where `compute` works on one rank alone,
                which makes it without a claim: one that a killed run has left would keep it out.
            read_here: whether later units of this stage read these.
        """
        if read_here:
            self._maker.mark_read_here(units)
        self.records.place(units)
        recorded = self.records.listing().recorded
        self.log_phase(len(units), missing=sum(unit not in recorded for unit in units))
        if take_over:
            self._compute_of_unit.update(dict.fromkeys(units, compute))
        if self._dealer is not None and take_over:
            self._num_dealt += 1
            self._dealt = DealtUnits(units, self._dealer, f"{self._counter}-{self._num_dealt}")
            return sum(
                self._maker.make(unit, compute, is_dealt=True)
                for unit in self._dealt
                if unit not in recorded or self._maker.verify(unit) is not None
            )
        num_computed = sum(
            self._maker.make(unit, compute, is_dealt=not take_over)
            for unit in deal(units, self.world.rank, self.world.size)
            if unit not in recorded or self._maker.verify(unit) is not None
        )
        if take_over:
            num_computed += sum(
                self._maker.make(unit, compute, taken_over=True)
                for unit in free_units(units, self.records, self.world)
            )
        return num_computed

    def next_unit(self, otherwise: str | None) -> str | None:
        """What a counter deals this rank after the unit at work, for who begins it early; `otherwise` where
        none deals."""
        return otherwise if self._dealt is None else self._dealt.following()

    def log_phase(self, count: int, *, missing: int, of: str = "units") -> None:
        """Note what this rank begins: so many units, or steps of a training, of which some are missing."""
        if count:
            self.log.write("phase", of=of, count=count, missing=missing)

    def wait_for(self, units: Sequence[str]) -> None:
        """Until every unit has a record; a rank that waits makes the units of one that died. All ranks call
        it."""
        if self._dealer is not None:
            self._dealer.wait()
        self._wait(units)

    def _wait(self, units: Sequence[str], *, until_whole: bool = False) -> None:
        """Until every unit has a record, and with `until_whole` each is known to be whole."""

        def try_one(unit: str, watch: ClaimWatch) -> bool:
            return self._maker.make(unit, self._compute_of_unit.get(unit), taken_over=True, watch=watch)

        wait_for_units(
            units,
            self.records,
            until_whole=until_whole,
            can_make=self._compute_of_unit.__contains__,
            try_one=try_one,
            name=f"rank {self.world.rank}",
        )

    def remove_stale_files(self) -> None:
        """Remove temporary files and claims of processes that were killed, also of lost hosts."""
        remove_stale_temporaries(self.root)
        for folder in (self.root, *self.records.folders()):
            remove_dead_claims(folder)

    def missing_units(self, units: Sequence[str]) -> list[str]:
        """Of all units of a phase, those without a record now."""
        self.records.place(units)
        return missing_of(units, self.records.listing())

    def is_damaged(self, unit: str) -> bool:
        """Whether a unit with a record has a file that does not have its checksum."""
        return self._maker.verify(unit) is not None

    def has_faults(self, units: Sequence[str]) -> bool:
        """Whether some of all units of a phase have no record, or are damaged."""
        return bool(self.missing_units(units)) or any(map(self.is_damaged, units))

    def make_unit(self, unit: str, compute: Compute) -> bool:
        """Compute and publish one unit that the caller has dealt to this rank alone; False where it is
        whole."""
        return self._maker.make(unit, compute, is_dealt=True)

    def summaries(self, units: Sequence[str]) -> list[dict[str, Any]]:
        return [
            self._summaries[unit] if unit in self._summaries else self.records.read(unit)["summary"]
            for unit in units
        ]

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
            wait: return only when the directory is complete, on every rank: for what all ranks do with it
                next. They compare what they read of it.
        """
        if self._dealer is not None:
            self._complete_together(units, describe, afterwards, self._dealer, wait=wait)
        else:
            self._complete_apart(units, describe, afterwards, wait=wait)
        if self.manifest_path.is_file():
            remove_computed(self.root)

    def _complete_apart(
        self,
        units: Sequence[str],
        describe: Callable[[], Manifest | Mapping[str, Any]],
        afterwards: Callable[[], None] | None,
        *,
        wait: bool,
    ) -> None:
        """`complete` for ranks that share only the file system."""
        self._wait([unit for unit in units if unit in self._compute_of_unit])
        self.log.finish(seconds=self._seconds())
        self._publish_manifest(units, describe, afterwards)
        if wait:
            self._wait(units)
            patience = Patience()
            while not self.manifest_path.is_file():  # another rank writes it, or has died
                self._publish_manifest(units, describe, afterwards)
                patience.sleep()

    def _complete_together(
        self,
        units: Sequence[str],
        describe: Callable[[], Manifest | Mapping[str, Any]],
        afterwards: Callable[[], None] | None,
        dealer: Dealer,
        *,
        wait: bool,
    ) -> None:
        """`complete` for ranks with a dealer: rank 0 publishes when all have got here."""
        dealer.wait()
        self.log.finish(seconds=self._seconds())
        if self.world.is_first:
            self._wait(units)  # until its client sees the records too
            self._publish_manifest(units, describe, afterwards)
        if wait:
            dealer.wait()
            os.scandir(self.root).close()  # a client asks the server anew for names that were not there

    def _publish_manifest(
        self,
        units: Sequence[str],
        describe: Callable[[], Manifest | Mapping[str, Any]],
        afterwards: Callable[[], None] | None,
    ) -> None:
        if missing_of(units, self.records.listing()):
            return
        watch, patience, path = ClaimWatch(), Patience(), self.root / ".manifest.claim"
        while True:
            with claim(path, watch=watch) as is_mine:
                if self.manifest_path.is_file() and not (self._was_complete and self.world.is_first):
                    return
                if is_mine:
                    self._write_manifest(units, describe)
                    self.log.write("complete", manifest=sha256_of_file(self.manifest_path))
                    break
            # Who has the claim writes it, or was killed on another host, which only time can tell.
            if self.manifest_path.is_file() or watch.look(path) == "held":
                return
            patience.sleep()
        log_for_all(_logger, self.world, "complete: %s (%.1f s)", self.root, self._seconds())
        if afterwards is not None:
            afterwards()

    def _write_manifest(
        self, units: Sequence[str], describe: Callable[[], Manifest | Mapping[str, Any]]
    ) -> None:
        files, self._summaries = self.records.read_all(units)
        own = to_json(describe())
        self._summaries = {}
        manifest = {**self.identity, **own, **list_files(self.root, files)}
        publish_json(self.manifest_path, manifest, seal=True)
        # Every unit has its record: whoever still writes one makes it for nothing, and no claim is needed.
        # One of a rank that was killed on another host would stay, for only time tells that it is gone.
        remove_stale_temporaries(self.root, seconds_until_given_up=_SECONDS_AT_THE_END)
        remove_dead_claims(self.root)
        for folder in self.records.folders():
            for left in folder.glob(".*.claim"):
                left.unlink(missing_ok=True)

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
    dealer: Dealer | None = None,
    leftovers: Collection[str] = (),
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
        dealer: deals the units to ranks that were launched together; None (or of one rank): a fixed share
            each, and claims.

    Raises:
        UserError: the directory holds files that are not this stage's, or a run with other inputs or flags.
    """
    identity = {
        "format": f"mlpmem-{stage}",
        "version": version,
        "inputs": dict(inputs),
        "config": deciding_values(config, resolved or {}, flags=flags),
    }
    check_output(output, stage=stage, leftovers=leftovers)
    settle_identity(output, identity, defaults=default_values(type(config)))
    if world.is_first:
        remove_damaged_manifest(output)
    directory = StageDirectory(output, identity, world, dealer)
    if world.is_first:
        directory.remove_stale_files()
        publish_json(output / "run.json", describe_run(config, world))
    directory.log.begin(world=world.size, process=holder(os.getpid()))
    return directory
