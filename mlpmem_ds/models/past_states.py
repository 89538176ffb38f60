"""States of a position and of those before it, side by side: what a memory with a window reads.

Place in the pipeline: `train` makes them of stored or computed inputs, `evaluate` of the base's states.

Shapes: n positions of one window of the base, in order, P positions before each, I numbers of a state.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def with_past(states_nI: torch.Tensor, past: int) -> torch.Tensor:
    """[n, (P + 1) I]: of each position the states of the P before it, the oldest first, and its own.

    Before the first position there is nothing: zeros, as in front of a prompt.
    """
    count = len(states_nI)
    shifted = [
        functional.pad(states_nI[: max(0, count - steps)], (0, 0, min(steps, count), 0))
        for steps in range(past, 0, -1)
    ]
    return torch.cat([*shifted, states_nI], dim=1)
