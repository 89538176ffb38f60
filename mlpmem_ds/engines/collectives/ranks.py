"""What ranks that were launched together can do with each other, however they are connected.

A stage takes a `Ranks` as a value and gives the same bytes for any number of ranks and any connection: it
sums whole numbers only, whose sum is the same in any order.

Every operation begins with a meeting: ranks wait for a slow one for as long as it shows signs of life, and
only what follows, the transfer itself, has a time limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np

from mlpmem_ds.core.errors import LostRankError

Array: TypeAlias = np.ndarray[Any, Any]
RANK_TIMEOUT_SECONDS = 90.0
"""without a sign of life, until a rank is lost; default of the flag --rank-timeout-seconds"""


class RanksLost(LostRankError):
    """Another rank has ended, or shows no sign of life: no wrong input, and the same command continues.

    Args:
        ranks: their numbers; none where unknown.
        how: what happened to them, such as "has ended".
        hosts: rank → its host, of those where it is known.
        who: in place of ranks, what was lost.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        how: str,
        *,
        hosts: Mapping[int, str] = MappingProxyType({}),
        who: str = "another rank",
    ) -> None:
        self.ranks = tuple(ranks)
        shown = [f"{rank} on {hosts[rank]}" if hosts.get(rank) else str(rank) for rank in self.ranks]
        named = f"rank {', '.join(shown)}" if shown else who
        super().__init__(
            f"{named} {how}: look at that host and at what the rank wrote last, and run the same command"
            " again, which continues where it was"
        )


class Ranks(Protocol):
    """This process and the others of one launch.

    Every method but `next_number` is called by all ranks, in the same order. To be used as
    `with open_ranks(…) as ranks`, so that the others hear of an error.

    Raises:
        RanksLost: (each method) another rank is gone, with its number.
    """

    rank: int
    size: int

    def sum(self, array: Array) -> Array:
        """The elementwise sum of every rank's array (one shape and dtype), on every rank.

        The order of the additions is not fixed: whole numbers alone give the same at any size.
        """

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (anything that pickles), in rank order, on every rank."""

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        """All-to-all: `parts[j]` goes to rank j, and result[i] is what rank i had for this one.

        Each part has its own shape and dtype (numbers only).
        """

    def next_number(self, counter: str) -> int:
        """0, 1, 2, …: each number to one caller among all ranks. Any rank calls it at any time."""

    def wait(self) -> None:
        """Until every rank calls this."""

    def close(self) -> None:
        """Leave, when every rank has got here."""

    def fail(self, error: BaseException | None = None) -> None:
        """Leave because of an error: the others stop waiting for this rank, and hear which was the first."""

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.fail(error)


def culprits(rank: int, error: BaseException | None) -> tuple[int, ...]:
    """The ranks to name to the others when this one leaves with an error: those that it lost, or itself."""
    return error.ranks if isinstance(error, RanksLost) and error.ranks else (rank,)
