"""How a rank waits for others without a load on the file system: longer and longer pauses, and one unit tried
a round."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mlpmem_ds.core.claims import ClaimWatch
from mlpmem_ds.core.unit_records import Listing, UnitRecords

_logger = logging.getLogger(__name__)
_MIN_SECONDS = 0.2
_MAX_SECONDS = 30.0
_SHARE_OF_WAIT = 0.25  # so that waiting by rounds takes at most a quarter longer than the thing waited for
_SECONDS_BETWEEN_LINES = 60.0
_MAX_WATCHED = 2  # claims looked at in a round
_MAX_DOUBTFUL = 2  # units not known to be whole that are looked at in a round
_random = random.Random()  # not the seeded one: ranks shall choose differently


class Patience:
    """The pauses of one wait: .2 s, later a quarter of the time waited so far, at most 30 s."""

    def __init__(self) -> None:
        self._start = self._last_line = time.monotonic()

    @property
    def pause_seconds(self) -> float:
        waited = time.monotonic() - self._start
        return min(max(_MIN_SECONDS, _SHARE_OF_WAIT * waited), _MAX_SECONDS)

    def sleep(self) -> None:
        time.sleep(self.pause_seconds)

    def log(self, message: str, *values: object) -> None:
        """Warn of what is waited for, once a minute."""
        if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            _logger.warning(message, *values)


class Choice:
    """Chooses what a waiting rank tries next: any unit that is free, else one whose holder is gone.

    Any and not the first: many ranks choose at the same time.
    """

    def __init__(self, claim_path: Callable[[str], Path]) -> None:
        self._claim_path = claim_path
        self.watch = ClaimWatch()
        self._watched: list[str] = []

    def of(self, free: Sequence[str], claimed: Sequence[str]) -> str | None:
        """A unit to try, or None: all are worked at, as far as a look at two claims tells."""
        if free:
            return _random.choice(free)
        still = set(claimed)
        self._watched = [unit for unit in self._watched if unit in still]
        others = [unit for unit in claimed if unit not in self._watched]
        missing = min(_MAX_WATCHED - len(self._watched), len(others))
        self._watched += _random.sample(others, missing)
        for unit in list(self._watched):
            state = self.watch.look(self._claim_path(unit))
            if state == "gone":
                return unit
            if state == "held":  # seen alive: look at another next time
                self._watched.remove(unit)
        return None


def wait_for_units(
    units: Sequence[str],
    records: UnitRecords,
    *,
    until_whole: bool,
    can_make: Callable[[str], bool],
    try_one: Callable[[str, ClaimWatch], bool],
    name: str,
) -> None:
    """Until every unit has a record; the units that no live rank works at are made meanwhile.

    A round is one listing, for any number of units and ranks, and one unit tried: any that is free.

    Args:
        units: waited for.
        records: of the directory.
        until_whole: also until each is known to be whole.
        can_make: whether this rank can make a unit.
        try_one: makes a unit, or compares it with its checksums; given what has watched the claims; says
            whether it made one.
        name: of this rank, for messages.
    """
    patience, choice = Patience(), Choice(records.claim_path)
    listing = records.listing()
    left: Sequence[str] = units
    while left := _unfinished(left, records, listing, until_whole=until_whole):
        tried = [unit for unit in left if unit in listing.recorded or can_make(unit)]
        unit = choice.of(
            [unit for unit in tried if unit not in listing.claimed],
            [unit for unit in tried if unit in listing.claimed],
        )
        if unit is None or not try_one(unit, choice.watch):
            patience.log(
                "%s waits for %d units that other ranks compute, the first is %s", name, len(left), left[0]
            )
            patience.sleep()
        listing = records.listing()


def _unfinished(
    units: Iterable[str], records: UnitRecords, listing: Listing, *, until_whole: bool
) -> list[str]:
    """Those without a record; with `until_whole` also those that are not known to be whole."""
    left, num_doubtful = [], 0
    for unit in units:
        if unit in listing.recorded:
            if not until_whole or (num_doubtful < _MAX_DOUBTFUL and records.is_trusted(unit)):
                continue
            num_doubtful += 1
        left.append(unit)
    return left
