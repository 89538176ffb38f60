"""The steps of a training: schedule, validation, checkpoints, stop requests, steps that had to be skipped.

Used by `train` and `train_base`. The learning rate is a function of the step alone, so a resumed run needs no
scheduler's state, at any world size.
"""

from __future__ import annotations

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
from mlpmem_ds.engines.deepspeed import Engine
from mlpmem_ds.engines.processes import StopRequest
from mlpmem_ds.stages.training.metrics import Metrics, progress_note

_logger = logging.getLogger(__name__)
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


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How steps are run. `names` are those of the values that a forward returns after the loss, summed over
    its rows."""

    rows_per_step: int
    unit: str
    num_steps: int
    log_every: int
    save_every: int
    learning_rate: Callable[[int], float]
    names: tuple[str, ...] = ()
    deadline: float = math.inf  # of time.monotonic()
    validate_every: int = 0
    """steps between calls of `validate`; 0 = never"""
    max_skipped: int = 0
    """steps in a row without finite gradients after which the run stops; 0 = never"""
    flops_per_row: float = 0.0
    """of forward and backward; 0 = not known, and no MFU"""
    peak_flops: float = 0.0
    """a second, of all ranks together"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Steps done, of the whole run, and why the loop ended."""

    steps: int
    reason: Literal["done", "asked", "deadline", "patience"]


def run_steps(
    engine: Engine,
    batches: Iterator[tuple[Sequence[tuple[Any, ...]], float]],
    *,
    first: int,
    stop: int,
    settings: LoopSettings,
    save: Callable[[int], None],
    stop_request: StopRequest,
    progress: Progress,
    metrics: Metrics,
    validate: Callable[[int], bool] | None = None,
    explain: Callable[[int], str] | None = None,
) -> Outcome:
    """Run the steps [first, stop); saves on the schedule, and when the run has to stop.

    Args:
        batches: this rank's micro-batches of each step (a forward's arguments each), and the seconds waited
            for them.
        save: publishes a checkpoint after so many steps.
        validate: called after so many steps; says whether to stop for want of progress.
        explain: what is wrong with the batch of a step whose gradients were not finite, in words; collective.

    Raises:
        UserError: too many steps in a row had gradients that are not finite.
    """
    totals: torch.Tensor | None = None
    since, waited, counted, applied, skipped_in_a_row = time.perf_counter(), 0.0, 0, 0, 0
    for step, (micro_batches, seconds) in zip(range(first, stop), batches, strict=False):
        rate, skipped_before = settings.learning_rate(step), engine.skipped_steps
        outputs = engine.train_step(micro_batches, rate)
        waited, counted, done = waited + seconds, counted + 1, step + 1
        if engine.skipped_steps > skipped_before:
            skipped_in_a_row += 1
            _complain(engine, step, skipped_in_a_row, settings, explain)
        else:
            skipped_in_a_row, applied = 0, applied + 1
            sums = torch.stack(
                [torch.cat([value.reshape(-1).float() for value in output]) for output in outputs]
            )
            totals = sums.mean(0) if totals is None else totals + sums.mean(0)
        note = ""
        if done % settings.log_every == 0 or done in (stop, settings.num_steps):
            now = time.perf_counter()
            if totals is None:  # every step of this interval was skipped
                totals = torch.full((1 + len(settings.names),), math.nan, device=engine.device)
            values = _describe(
                engine,
                totals / max(applied, 1),
                settings,
                rate,
                counted / (now - since),
                waited / (now - since),
            )
            metrics.write(done, values)
            note = progress_note(values)
            totals, since, waited, counted, applied = None, now, 0.0, 0, 0
        progress.advance(settings.rows_per_step, note)
        is_last = done == settings.num_steps
        if (
            validate is not None
            and settings.validate_every
            and (done % settings.validate_every == 0 or is_last)
        ):
            start = time.perf_counter()
            has_stalled = validate(done)
            since += time.perf_counter() - start  # of no step
            if has_stalled and not is_last:
                save(done)
                return Outcome(steps=done, reason="patience")
        reason = _reason_to_stop(engine, stop_request, settings.deadline)
        if reason is not None and not is_last:
            save(done)
            return Outcome(steps=done, reason=reason)
        if done % settings.save_every == 0 or is_last:
            save(done)
    return Outcome(steps=stop, reason="done")


def _complain(
    engine: Engine, step: int, in_a_row: int, settings: LoopSettings, explain: Callable[[int], str] | None
) -> None:
    """Name a step that changed nothing, and stop after too many."""
    cause = explain(step) if explain is not None else ""
    named = f"step {step + 1}: the gradients of batch {step} are not finite{f' ({cause})' if cause else ''}"
    if engine.is_first:
        _logger.warning("%s; it is skipped (%d so far)", named, engine.skipped_steps)
    if settings.max_skipped and in_a_row >= settings.max_skipped:
        raise UserError(
            f"{named}, as in the {in_a_row - 1} steps before it: nothing is learnt. Lower --learning-rate or"
            " mend the data; the same command continues from the newest checkpoint"
        )


def _reason_to_stop(
    engine: Engine, stop_request: StopRequest, deadline: float
) -> Literal["asked", "deadline"] | None:
    if stop_request.agreed():
        return "asked"
    return "deadline" if _deadline_passed(engine, deadline) else None


def _deadline_passed(engine: Engine, deadline: float) -> bool:
    """Whether the ranks' clocks agree that time is over (any of them is enough)."""
    if math.isinf(deadline):
        return False
    return bool(engine.mean(torch.tensor(float(time.monotonic() > deadline), device=engine.device)) > 0)


def _describe(
    engine: Engine,
    totals: torch.Tensor,
    settings: LoopSettings,
    rate: float,
    steps_per_second: float,
    waiting: float,
) -> dict[str, float]:
    """What is logged: means over the ranks, the micro-batches and the steps since the last time that were not
    skipped."""
    loss, *others = engine.mean(totals).tolist()
    weight = dict(zip(settings.names, others, strict=True)).get("weight", 1.0)
    rows_per_second = steps_per_second * settings.rows_per_step
    values = {
        "loss": loss,
        **{
            name: value / weight
            for name, value in zip(settings.names, others, strict=True)
            if name != "weight"
        },
        "learning_rate": rate,
        "gradient_norm": engine.gradient_norm,
        f"{settings.unit}_per_second": rows_per_second,
    }
    if settings.flops_per_row and settings.peak_flops:
        values["mfu"] = rows_per_second * settings.flops_per_row / settings.peak_flops
    return {
        **values,
        "data_wait_share": waiting,
        "memory_bytes": max_memory(engine.device),
        "skipped_steps": engine.skipped_steps,
    }


def max_memory(device: torch.device) -> float:
    """The most bytes that this rank has held: of the GPU's memory, or resident where there is none."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts it in KiB
