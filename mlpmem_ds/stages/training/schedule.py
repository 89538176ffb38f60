"""Part of `train` and `train_base`: the learning rate of each step.

It is a function of the step's number alone: a resumed run needs no scheduler's state, at any world size.
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "wsd", "constant"]
SCHEDULE_HELP = (
    "after the warm-up: cosine to a tenth, linear to 0, wsd (flat, then linear to 0 at the end), or constant"
)
DECAY_SHARE = 0.2
"""of the steps after the warm-up that decay at the end of `wsd`, unless told otherwise"""
_FINAL_SHARE = 0.1  # of the peak, at the end of a cosine


def learning_rate_at(
    step: int,
    *,
    peak: float,
    num_steps: int,
    warmup_steps: int,
    schedule: Schedule,
    decay_share: float = DECAY_SHARE,
) -> float:
    """The learning rate of step number `step` (from 0): linear warm-up, then the schedule.

    cosine falls to a tenth; linear to 0; wsd (warm-up, stable, decay) is flat and falls to 0 in its last
    `decay_share`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "wsd":
        return peak * min(1.0, (1 - done) / decay_share) if decay_share > 0 else peak
    return peak * (_FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))
