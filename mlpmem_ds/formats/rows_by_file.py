"""Rows at any places of several files, taken file by file. N rows asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def rows_by_file(file_of_N: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each file that is asked for, in order, with the places in `file_of_N` (int64 `[N]`, from 0) that ask
    for it, in order."""
    # NumPy sorts 16-bit integers by their digits, in a tenth of the time.
    is_short = len(file_of_N) > 0 and int(file_of_N.max()) < 1 << 16
    order_N = np.argsort(file_of_N.astype(np.uint16) if is_short else file_of_N, kind="stable")
    starts = np.flatnonzero(np.diff(file_of_N[order_N], prepend=-1))
    for places in np.split(order_N, starts[1:]) if len(order_N) else ():
        yield int(file_of_N[places[0]]), places
