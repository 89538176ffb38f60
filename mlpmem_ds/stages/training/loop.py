"""Part of `train` and `train_base`: the steps one after another, and what happens between them.

That is validations, checkpoints, requests to stop, limits of time, and steps that had to be skipped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.log import Progress
from mlpmem_ds.engines.deepspeed.engine import Engine
from mlpmem_ds.engines.processes import StopRequest
from mlpmem_ds.stages.training.metrics import Metrics, progress_note
from mlpmem_ds.stages.training.parts import Steps

_logger = logging.getLogger(__name__)
Reason = Literal["done", "patience", "budget", "asked", "deadline"]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the steps are run."""

    steps: Steps
    rows: str
    """what the rows of a batch are called: `positions`, `tokens`"""
    sums: tuple[str, ...]
    """names of the values that a forward returns after the loss, summed over its rows"""
    learning_rate: Callable[[int], float]
    log_every: int
    save_every: int
    max_skipped: int | None = None
    """steps in a row without finite gradients after which the run stops, or all steps there are; None =
    never"""
    stops_at: float = math.inf
    """of time.monotonic(): two steps later the run is saved and stops, to be continued"""
    ends_at: float = math.inf
    """of time.monotonic(): the second step after it is the last one of the training"""
    flops_per_row: float = 0.0
    """of forward and backward; 0 = unknown, and no MFU"""
    peak_flops: float = 0.0
    """a second, of all ranks together"""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls, each with the number of steps done. All are collective."""

    save: Callable[[int, Reason | None], None]
    """publishes a checkpoint; given why the run ends with it, None where it goes on or has done all steps"""
    validate: Callable[[int], bool] | None
    """says whether to stop, because the last validations were no better than an earlier one; None = none"""
    explain: Callable[[int], str]
    """what is wrong, in words, with the batch of a step whose gradients were not finite"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Steps done, of the whole run, and why the loop ended.

    `asked` and `deadline` leave a run that continues; after the others the training is over.
    """

    steps: int
    reason: Reason

    @property
    def is_over(self) -> bool:
        return self.reason not in ("asked", "deadline")


def run_steps(
    engine: Engine,
    batches: Iterator[tuple[Sequence[tuple[Any, ...]], float]],
    *,
    first: int,
    settings: LoopSettings,
    hooks: Hooks,
    stop_request: StopRequest,
    progress: Progress,
    metrics: Metrics,
) -> Outcome:
    """Run the steps from `first` on; saves on the schedule, and where the run ends or has to stop.

    `batches` gives this rank's micro-batches of each step (a forward's arguments each), and the seconds
    waited for them.

    Raises:
        UserError: too many steps in a row, or all of them, had gradients that are not finite.
    """
    steps, interval, skipped_in_a_row = settings.steps, _Interval(engine, settings), 0
    for step, (micro_batches, seconds) in zip(range(first, steps.count), batches, strict=False):
        rate, skipped_before, done = settings.learning_rate(step), engine.skipped_steps, step + 1
        outputs = engine.train_step(micro_batches, rate)
        is_skipped = engine.skipped_steps > skipped_before
        interval.add(seconds, None if is_skipped else outputs)
        skipped_in_a_row = skipped_in_a_row + 1 if is_skipped else 0
        if is_skipped:
            _complain(engine, step, skipped_in_a_row, settings, hooks.explain)
        reason = _reason_to_end(stop_request, settings)
        is_last = done == steps.count or reason == "budget"
        note = ""
        if is_last or done % settings.log_every == 0 or (steps.per_pass and done % steps.per_pass == 0):
            values = interval.close(rate)
            metrics.write(done, values)
            note = progress_note(values)
        progress.advance(steps.rows, note)
        if hooks.validate is not None and (is_last or done % steps.validate_every == 0):
            with interval.paused():
                has_stalled = hooks.validate(done)
            reason = "patience" if has_stalled and not is_last else reason
        if is_last or reason is not None or done % settings.save_every == 0:
            hooks.save(done, None if done == steps.count else reason)
        if reason is not None and done != steps.count:
            return Outcome(steps=done, reason=reason)
    return Outcome(steps=steps.count, reason="done")


class _Interval:
    """The steps since the last log line: their losses, summed on the device, and their time."""

    def __init__(self, engine: Engine, settings: LoopSettings) -> None:
        self._engine, self._settings = engine, settings
        self._begin()

    def _begin(self) -> None:
        self._totals: torch.Tensor | None = None
        self._num_steps, self._num_applied, self._seconds_waited = 0, 0, 0.0
        self._start = time.perf_counter()

    def add(self, seconds_waited: float, outputs: Sequence[tuple[torch.Tensor, ...]] | None) -> None:
        """A step, and what its forwards returned; None where it was skipped."""
        self._num_steps += 1
        self._seconds_waited += seconds_waited
        if outputs is None:
            return
        self._num_applied += 1
        sums = torch.stack([torch.cat([value.reshape(-1).float() for value in output]) for output in outputs])
        self._totals = sums.mean(0) if self._totals is None else self._totals + sums.mean(0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no part of the steps' time."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def close(self, learning_rate: float) -> dict[str, float]:
        """The interval's metrics; the next one begins. Collective.

        Losses are means over the ranks, the micro-batches and the steps that were not skipped; NaN where all
        of them were.
        """
        engine, settings = self._engine, self._settings
        seconds = time.perf_counter() - self._start
        totals = self._totals
        if totals is None:
            totals = torch.full((1 + len(settings.sums),), math.nan, device=engine.device)
        loss, *sums = engine.mean(totals / max(self._num_applied, 1)).tolist()
        sum_of = dict(zip(settings.sums, sums, strict=True))
        weight = sum_of.pop("weight", 1.0)
        rows_per_second = self._num_steps / seconds * settings.steps.rows
        values = {
            "loss": loss,
            **{name: value / weight for name, value in sum_of.items()},
            "learning_rate": learning_rate,
            "gradient_norm": engine.gradient_norm,
            f"{settings.rows}_per_second": rows_per_second,
        }
        if settings.flops_per_row and settings.peak_flops:
            values["mfu"] = rows_per_second * settings.flops_per_row / settings.peak_flops
        values |= {
            "data_wait_share": self._seconds_waited / seconds,
            "memory_bytes": max_memory(engine.device),
            "skipped_steps": engine.skipped_steps,
        }
        self._begin()
        return values


def _complain(
    engine: Engine, step: int, in_a_row: int, settings: LoopSettings, explain: Callable[[int], str]
) -> None:
    """Name a step that changed nothing, and stop after too many."""
    cause = explain(step)
    named = f"step {step + 1}: the gradients of batch {step} are not finite{f' ({cause})' if cause else ''}"
    if engine.is_first:
        _logger.warning("%s; it is skipped (%d so far)", named, engine.skipped_steps)
    if settings.max_skipped is not None and in_a_row >= min(settings.max_skipped, settings.steps.count):
        raise UserError(
            f"{named}, as in the {in_a_row - 1} steps before it: nothing is learnt. Lower --learning-rate or"
            " mend the data; the same command continues from the newest checkpoint"
        )


def _reason_to_end(stop_request: StopRequest, settings: LoopSettings) -> Reason | None:
    """Why this step is the last one, of this start or of the training; the ranks agree. Collective."""
    now = time.monotonic()
    is_asked, is_spent, is_late = stop_request.agreed(now > settings.ends_at, now > settings.stops_at)
    return "asked" if is_asked else "budget" if is_spent else "deadline" if is_late else None


def max_memory(device: torch.device) -> float:
    """The peak of this rank's memory in bytes: of the GPU, or resident where there is no GPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts it in KiB
