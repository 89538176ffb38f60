"""Part of `evaluate`: speed of scoring against the size of the datastore, on the same positions.

Measured when every score is there, by the one rank that writes the report, so that no unit of this run
disturbs it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.evaluation import Speed
from mlpmem_ds.stages.evaluation.arms.arm import Arm
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass

_RUNS = 3


def measure_speeds(
    arms: Sequence[Arm], forward_pass: ForwardPass, corpus: CorpusSplit, num_positions: int | None
) -> tuple[Speed, ...]:
    """Medians of three runs on the first positions of a split; () where no arm has a datastore.

    An arm with a datastore is measured at each of its sizes, the others once.

    Args:
        arms: those that read `forward_pass` are measured.
        forward_pass: the base's.
        corpus: the split.
        num_positions: None = nothing is measured.
    """
    arms = [arm for arm in arms if arm.forward_pass is forward_pass]
    if num_positions is None or not any(arm.sizes for arm in arms):
        return ()
    block = Block(0, min(num_positions, corpus.num_positions))
    read = partial(forward_pass.scan, corpus, block, [point for arm in arms for point in arm.reads])
    scan, pass_seconds = read(), _median_seconds(read)
    speeds = []
    for arm in arms:
        for size in arm.sizes or (None,):
            sized = arm if size is None else arm.at_size(size)
            sized.load()
            seconds = pass_seconds + _median_seconds(partial(sized.score, scan))
            speeds.append(
                Speed(
                    arm=arm.name,
                    keys=size,
                    positions=block.size,
                    tokens_per_second=block.size / seconds,
                )
            )
    return tuple(speeds)


def _median_seconds(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
