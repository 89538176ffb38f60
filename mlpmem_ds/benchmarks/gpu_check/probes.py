"""A command as a rank of the GPU check: it runs, then says which GPUs it used, and how long those were idle.

`python -m mlpmem_ds.benchmarks.gpu_check.probes REPORTS MAX_STEPS COMMAND FLAGS…`, also under torchrun.
Writes REPORTS/rank-R.json. A training is profiled for a few steps, and ended after MAX_STEPS (0 = never),
before it saves anything.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mlpmem_ds import commands
from mlpmem_ds.core.world import world_from_environment
from mlpmem_ds.engines.deepspeed.engine import Engine

_PROFILED_STEPS = 4


class EnoughSteps(BaseException):
    """The training has run for as long as is measured; no error, which the front-end would report."""


class StepProbe:
    """Replaces `Engine.train_step`: counts steps, profiles some, ends the training after `max_steps`."""

    def __init__(self, step: Callable[..., Any], max_steps: int) -> None:
        self._step, self._max_steps = step, max_steps
        self._first = max(1, max_steps // 3)
        self._num_steps = 0
        self._is_profiling = False
        self._profiler = profile(
            activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
        )
        self.idle_share: float | None = None

    def __call__(self, engine: Engine, *arguments: Any) -> Any:
        if self._num_steps == self._first and self._num_steps + _PROFILED_STEPS < self._max_steps:
            self._profiler.start()
            self._is_profiling = True
        if self._num_steps == self._first + _PROFILED_STEPS:
            self.close()
        if self._num_steps == self._max_steps:
            raise EnoughSteps
        self._num_steps += 1
        return self._step(engine, *arguments)

    def close(self) -> None:
        """Stop the profiler if it runs: a process that ends with it crashes."""
        if not self._is_profiling:
            return
        self._is_profiling = False
        self._profiler.stop()
        self.idle_share = idle_share(
            (event.time_range.start, event.time_range.end)
            for event in self._profiler.events() or ()
            if (event.device_type == torch.autograd.DeviceType.CUDA) == torch.cuda.is_available()
        )


def idle_share(spans: Iterable[tuple[float, float]]) -> float | None:
    """The share of the time from the first start to the last end without an open span; None without any."""
    ordered = sorted(spans)
    if not ordered:
        return None
    busy, reached = 0.0, ordered[0][0]
    for start, stop in ordered:
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    whole = reached - ordered[0][0]
    return 1 - busy / whole if whole > 0 else None


def run(reports: Path, max_steps: int, name: str, words: Sequence[str]) -> int:
    """The command's exit code; 0 for a training that was ended here."""
    rank = world_from_environment(os.environ).rank
    probe = StepProbe(Engine.train_step, max_steps)
    if max_steps:
        Engine.train_step = lambda engine, *arguments: probe(engine, *arguments)  # type: ignore[method-assign]
    try:
        code = int(getattr(commands, name.replace("-", "_"))(list(words), prog=name))
    except EnoughSteps:
        code = 0
    finally:
        probe.close()
    used = [
        number for number in range(torch.cuda.device_count()) if torch.cuda.max_memory_allocated(number) > 0
    ]
    said = {
        "gpus": used,
        "peak_bytes": max((torch.cuda.max_memory_allocated(number) for number in used), default=0),
        "idle_share": probe.idle_share,
    }
    (reports / f"rank-{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    return code


def main(argv: Sequence[str]) -> int:
    """The words of the command line."""
    reports, max_steps, name, *words = argv
    return run(Path(reports), int(max_steps), name, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
