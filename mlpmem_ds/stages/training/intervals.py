"""Part of `train` and `train_base`: how many steps to run between two checkpoints.

A checkpoint that takes C seconds is saved every T seconds, and failures are M seconds apart on average: C / T
of the time goes into saving, and at each failure T / 2 of work is lost, T / (2 M) of the time. The sum is
least at T = sqrt(2 C M) (Young, "A first order approximation to the optimum checkpoint interval", 1974; Daly,
2006, where C is not small next to M). The time of a start does not depend on T.
"""

from __future__ import annotations

import math

_HOUR, _DAY = 3600.0, 86400.0


def best_interval(checkpoint_seconds: float, step_seconds: float, failure_seconds: float) -> int:
    """Steps between checkpoints, 1 or more, that cost least time where failures are so many seconds apart."""
    return max(1, round(math.sqrt(2 * checkpoint_seconds * failure_seconds) / step_seconds))


def interval_advice(checkpoint_seconds: float, step_seconds: float) -> str:
    """A line for the log, for an expected failure an hour and one a day."""
    hourly, daily = (best_interval(checkpoint_seconds, step_seconds, seconds) for seconds in (_HOUR, _DAY))
    return (
        f"a checkpoint took {checkpoint_seconds:.2g} s, a step {step_seconds:.2g} s: least time is lost with"
        f" --save-every-steps {hourly} at a failure an hour, {daily} at one a day"
    )
