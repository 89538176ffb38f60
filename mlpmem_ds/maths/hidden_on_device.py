"""Part of a search on a GPU: what a query may not find, as ranges of ids on the device.

Shape legend: Q queries, S some of them, each maybe several times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlpmem_ds.maths.device_memory import on_device
from mlpmem_ds.maths.neighbours import Exclusion


class HiddenIds:
    """`Exclusion.covers` on a device; nothing is hidden without one."""

    def __init__(self, exclusion: Exclusion | None, device: torch.device) -> None:
        self.ranges: list[tuple[Tensor, Tensor]] = []
        if exclusion is None:
            return
        ids_Q = on_device(exclusion.query_ids_Q, device).to(torch.int64)
        self.ranges.append((ids_Q - exclusion.window, ids_Q + (exclusion.window + 1)))
        if exclusion.first_hidden_Q is not None and exclusion.stop_hidden_Q is not None:
            bounds = (exclusion.first_hidden_Q, exclusion.stop_hidden_Q)
            first_Q, stop_Q = (on_device(bound_Q, device) for bound_Q in bounds)
            self.ranges.append((first_Q, stop_Q))

    def bounds(self, query_rows_S: Tensor) -> Tensor:
        """First and stop of each range for some queries, int64 [2 ranges, S]."""
        bounds = [bound_Q[query_rows_S] for bounds in self.ranges for bound_Q in bounds]
        return torch.stack(bounds) if bounds else query_rows_S.new_empty((0, len(query_rows_S)))

    def mask(self, query_rows: Tensor, key_ids: Tensor) -> Tensor | None:
        """True where the key is hidden from the query, rows and ids broadcast against each other; None where
        no query hides anything."""
        hidden = None
        for first_Q, stop_Q in self.ranges:
            inside = (key_ids >= first_Q[query_rows]).logical_and_(key_ids < stop_Q[query_rows])
            hidden = inside if hidden is None else hidden.logical_or_(inside)
        return hidden
