"""Which unit a rank makes next: by a counter that the ranks of a launch share, or one of the others' that no
rank works at."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.unit_records import UnitRecords
from mlpmem_ds.core.world import World

_SECONDS_BETWEEN_LISTINGS = 1.0


class Dealer(Protocol):
    """Ranks that were launched together, as far as dealing units goes; `engines.collectives` has them."""

    size: int

    def next_number(self, counter: str) -> int:
        """0, 1, 2, …: each number to one caller among all ranks."""

    def wait(self) -> None:
        """Until every rank calls this."""


class DealtUnits(Iterator[str]):
    """The units that a counter gives this rank, for as long as there are any.

    A rank that is fast gets more of them; no file is asked.
    """

    def __init__(self, units: Sequence[str], dealer: Dealer, counter: str) -> None:
        self._units, self._dealer, self._counter = units, dealer, counter
        self._number: int | None = None  # drawn, and not given yet

    def __next__(self) -> str:
        unit = self.following()
        self._number = None
        if unit is None:
            raise StopIteration
        return unit

    def following(self) -> str | None:
        """The unit that is given next, which is this rank's from now on; None after the last."""
        if self._number is None:
            self._number = self._dealer.next_number(self._counter)
        return self._units[self._number] if self._number < len(self._units) else None


def free_units(units: Sequence[str], records: UnitRecords, world: World) -> Iterator[str]:
    """The others' units without record and claim: each rank's last one first, because it gets there last."""
    others = ((world.rank + step) % world.size for step in range(1, world.size))
    rows = itertools.zip_longest(*(reversed(deal(units, other, world.size)) for other in others))
    listing, listed = records.listing(), time.monotonic()
    for unit in (unit for row in rows for unit in row if unit is not None):
        if time.monotonic() - listed > _SECONDS_BETWEEN_LISTINGS:
            listing, listed = records.listing(), time.monotonic()
        if unit not in listing.recorded and unit not in listing.claimed:
            yield unit
