"""Pipeline: probes → **blocks of a search**: how keys, queries and lists are taken in turn, so that memory
stays bounded.

Shape legend: Q queries, P probes, M queries that probe one list.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

_FIRST_KEY_BLOCK = 2048


def growing_blocks(num_keys: int, key_block: int) -> Iterator[tuple[int, int]]:
    """[start, stop) over the keys: small at first, where every key enters because no bound exists yet,
    doubling to ``key_block``."""
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


def rectangle_blocks(widths_Q: Array, budget: int) -> Iterator[tuple[int, int]]:
    """[start, stop) over the queries: as many as fit in the budget where each row is as wide as the widest of
    them, at least one."""
    start = 0
    while start < len(widths_Q):
        # No more than fit at the first one's width: what lies behind is not looked at again and again.
        rest_Q = widths_Q[start : start + max(1, budget // max(1, int(widths_Q[start])))]
        costs_Q = np.maximum.accumulate(rest_Q) * np.arange(1, len(rest_Q) + 1)
        stop = start + max(1, int(np.searchsorted(costs_Q, budget, side="right")))
        yield start, stop
        start = stop


def order_of_probes(probes_QP: Array) -> Array:
    """Queries in the order of their first list: neighbours in it probe the same lists, which are read once
    for many of them."""
    return np.argsort(probes_QP[:, 0], kind="stable") if probes_QP.shape[1] else np.arange(len(probes_QP))


def probed_lists(
    probes_BP: Array, sizes_BP: Array, starts_BP: Array
) -> tuple[Array, list[tuple[int, int, int, int]]]:
    """The lists that a block of queries probes and that are not empty, one after the other.

    Candidates are laid out list by list, then query by query; ``starts_BP`` receives where those of each
    probe start.

    Returns:
        the flat places in ``probes_BP`` of all probes of these lists, list by list; and for each list its
        number, where its probes start and stop among those places, and its first candidate.
    """
    probes, sizes = probes_BP.ravel(), sizes_BP.ravel()
    order = np.argsort(probes, kind="stable")
    order = order[sizes[order] > 0]
    starts = np.cumsum(sizes[order]) - sizes[order]
    starts_BP.ravel()[order] = starts
    firsts = np.flatnonzero(np.diff(probes[order], prepend=-1))
    stops = np.append(firsts[1:], len(order))[: len(firsts)]
    lists = zip(
        probes[order[firsts]].tolist(), firsts.tolist(), stops.tolist(), starts[firsts].tolist(), strict=True
    )
    return order, list(lists)
