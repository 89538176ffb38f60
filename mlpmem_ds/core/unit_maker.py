"""How one unit of a stage directory is made: claimed, computed, published, recorded and logged."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlpmem_ds.core.claims import ClaimWatch, claim
from mlpmem_ds.core.log import EventLog
from mlpmem_ds.core.temporaries import is_own_temporary
from mlpmem_ds.core.unit_records import UnitRecords
from mlpmem_ds.core.unit_writer import UnitWriter

_logger = logging.getLogger(__name__)

Compute = Callable[[str, UnitWriter], Mapping[str, Any] | None]
"""writes the files of the unit of this name and returns its summary"""


class UnitMaker:
    """Makes units of the directory at `root`, or compares their files with their records."""

    def __init__(self, root: Path, records: UnitRecords, log: EventLog) -> None:
        self._root = root
        self._manifest_path = root / "manifest.json"
        self._records = records
        self._log = log
        self._read_here: set[str] = set()

    def mark_read_here(self, units: Iterable[str]) -> None:
        """Note that later units of this directory read these."""
        self._read_here.update(units)

    def verify(self, unit: str) -> str | None:
        """Compare a unit's files with their checksums: say what is wrong, or note that nothing is."""
        fault = self._records.fault(unit)
        if fault is None:
            self._records.mark_verified(unit)
        return fault

    def make(
        self,
        unit: str,
        compute: Compute | None,
        *,
        taken_over: bool = False,
        watch: ClaimWatch | None = None,
        is_dealt: bool = False,
    ) -> bool:
        """Compute and publish one unit; False where another process is at it, or has just made it.

        Args:
            unit: its name.
            compute: None = only compare its files.
            taken_over: it was dealt to another rank; then a record that is trusted is enough.
            watch: of a caller that asks again and again: it tells which claims' holders are gone.
            is_dealt: by a counter, or to the one rank that can make it: no other rank has it, and it needs no
                claim.

        Raises:
            DamagedDataError: it was damaged, and when made again it has other bytes than its record says.
        """
        path = self._records.path(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        claimed = claim(self._records.claim_path(unit), watch=watch)
        with contextlib.nullcontext(True) if is_dealt else claimed as is_mine:
            if not is_mine:
                return False
            # Asked anew: making the claim has brought this client's knowledge of the folder up to date.
            if path.exists():
                if taken_over and self._records.is_trusted(unit):
                    return False
                fault = self.verify(unit)
                if fault is None or compute is None:
                    return False
                _logger.warning("%s: making the unit again", fault)
                # Not complete meanwhile, for readers and for the other ranks, one of which may be about to
                # finish.
                os.replace(path, self._records.former_path(unit))
            if compute is None:
                return False
            self._manifest_path.unlink(missing_ok=True)
            start = time.monotonic()
            writer, summary = self._compute(unit, compute)
            is_read_here = unit in self._read_here
            self._records.refuse_other_bytes(unit, writer.records, is_read_here=is_read_here)
            writer.flush_folders()
            self._records.publish(unit, writer.records, summary or {})
            self._records.former_path(unit).unlink(missing_ok=True)
        seconds = round(time.monotonic() - start, 3)
        num_bytes = sum(file.bytes for file in writer.records)
        more = {"taken_over": taken_over, "read_here": is_read_here}
        more = {name: True for name, is_so in more.items() if is_so}
        self._log.write("unit", unit=unit, seconds=seconds, bytes=num_bytes, **more)
        return True

    def _compute(self, unit: str, compute: Compute) -> tuple[UnitWriter, Mapping[str, Any] | None]:
        """A unit's files and summary; once more where another host took this process for one that is gone."""
        writer = UnitWriter(self._root)
        try:
            return writer, compute(unit, writer)
        except FileNotFoundError as error:
            if not is_own_temporary(error.filename):
                raise
            _logger.warning("%s was removed while it was written: making the unit again", error.filename)
        writer = UnitWriter(self._root)
        return writer, compute(unit, writer)
