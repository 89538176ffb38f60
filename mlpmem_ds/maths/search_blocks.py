"""Pipeline: probes → **blocks of a search**: how keys, queries and lists are taken in turn, so that memory stays bounded.

Shape legend: Q queries, P probes, M queries that probe one list.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

_FIRST_KEY_BLOCK = 2048


def growing_blocks(num_keys: int, key_block: int) -> Iterator[tuple[int, int]]:
    """[start, stop) over the keys: small at first, where every key enters for want of a bound, doubling to ``key_block``."""
    start, size = 0, min(_FIRST_KEY_BLOCK, key_block)
    while start < num_keys:
        stop = min(start + size, num_keys)
        yield start, stop
        start, size = stop, min(2 * size, key_block)


def budget_blocks(costs_Q: Array, budget: int) -> Iterator[tuple[int, int]]:
    """[start, stop) over the queries: as many as fit in the budget, at least one."""
    total_Q = np.cumsum(costs_Q)
    start = 0
    while start < len(costs_Q):
        before = int(total_Q[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(total_Q, before + budget, side="right")))
        yield start, stop
        start = stop


def probed_lists(probes_QP: Array, sizes_QP: Array, starts_QP: Array) -> Iterator[tuple[int, Array, int]]:
    """Each list that is probed and not empty: its number, the flat places in ``probes_QP`` that name it, its first candidate.

    Candidates are laid out list by list, then query by query; ``starts_QP`` receives where those of each probe start.
    """
    probes, sizes = probes_QP.ravel(), sizes_QP.ravel()
    order = np.argsort(probes, kind="stable")
    order = order[sizes[order] > 0]
    starts = np.cumsum(sizes[order]) - sizes[order]
    starts_QP.ravel()[order] = starts
    firsts = np.flatnonzero(np.diff(probes[order], prepend=-1))
    for first, stop in zip(firsts, [*firsts[1:], len(order)], strict=False):
        yield int(probes[order[first]]), order[first:stop], int(starts[first])
