"""The steps of a training: schedule, checkpoints, stop requests, metrics. Used by `train` and `train_base`.

The learning rate is a function of the step alone, so a resumed run needs no scheduler's state, at any world size.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed import Engine, StopRequest

Schedule = Literal["cosine", "linear", "constant"]
_FINAL_SHARE = 0.1  # of the peak, at the end of a cosine


def learning_rate_at(step: int, *, peak: float, num_steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """The learning rate of step number `step` (from 0): linear warm-up, then a cosine to a tenth, a line to 0, or flat."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    return peak * (_FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


class Metrics:
    """Appends to OUTPUT/metrics.jsonl and OUTPUT/tensorboard on rank 0; does nothing elsewhere."""

    def __init__(self, output: Path, world: World, first_step: int) -> None:
        self._path = output / "metrics.jsonl"
        self._writer: Any = None
        if world.is_first:
            self._drop_after(first_step)
            from torch.utils.tensorboard import SummaryWriter  # 1 s to import

            self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)

    def _drop_after(self, step: int) -> None:
        """Steps that were done after the checkpoint that we resume from come again: keep each step once."""
        if not self._path.is_file():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # cut short by a crash
        self._path.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "time": round(time.time(), 3), **plain}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How steps are run. `names` are those of the values that a forward returns after the loss, summed over its rows."""

    rows_per_step: int
    unit: str
    num_steps: int
    log_every: int
    save_every: int
    learning_rate: Callable[[int], float]
    names: tuple[str, ...] = ()
    deadline: float = math.inf  # of time.monotonic()


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
) -> tuple[int, bool]:
    """Run the steps [first, stop); saves on the schedule, and when a stop was asked for.

    Args:
        batches: this rank's micro-batches of each step (a forward's arguments each), and the seconds waited for them.
        save: publishes a checkpoint after so many steps.

    Returns:
        the number of steps done (of the whole run), and whether it was stopped before `stop` (by signal or deadline).
    """
    totals: torch.Tensor | None = None
    since, waited, counted = time.perf_counter(), 0.0, 0
    for step, (micro_batches, seconds) in zip(range(first, stop), batches, strict=False):
        rate = settings.learning_rate(step)
        outputs = engine.train_step(micro_batches, rate)
        sums = torch.stack([torch.cat([value.reshape(-1).float() for value in output]) for output in outputs]).mean(0)
        totals = sums if totals is None else totals + sums
        waited, counted, done = waited + seconds, counted + 1, step + 1
        note = ""
        if done % settings.log_every == 0 or done in (stop, settings.num_steps):
            assert isinstance(totals, torch.Tensor)
            now = time.perf_counter()
            values = _describe(
                engine, totals / counted, settings, rate, counted / (now - since), waited / (now - since)
            )
            metrics.write(done, values)
            note = _note(values)
            totals, since, waited, counted = None, now, 0.0, 0
        progress.advance(settings.rows_per_step, note)
        must_stop = stop_request.agreed() or _deadline_passed(engine, settings.deadline)
        if must_stop and done < settings.num_steps:
            save(done)
            return done, True
        if done % settings.save_every == 0 or done == settings.num_steps:
            save(done)
    return stop, False


def _deadline_passed(engine: Engine, deadline: float) -> bool:
    """Whether the ranks' clocks agree that time is over (any of them is enough)."""
    if math.isinf(deadline):
        return False
    return bool(engine.mean(torch.tensor(float(time.monotonic() > deadline), device=engine.device)) > 0)


def _describe(
    engine: Engine, means: torch.Tensor, settings: LoopSettings, rate: float, steps_per_second: float, waiting: float
) -> dict[str, float]:
    """What is logged: means over the ranks, the micro-batches and the steps since the last time."""
    loss, *others = engine.mean(means).tolist()
    weight = dict(zip(settings.names, others, strict=True)).get("weight", 1.0)
    values = {
        "loss": loss,
        **{name: value / weight for name, value in zip(settings.names, others, strict=True) if name != "weight"},
    }
    return {
        **values,
        "learning_rate": rate,
        "gradient_norm": engine.gradient_norm,
        f"{settings.unit}_per_second": steps_per_second * settings.rows_per_step,
        "data_wait_share": waiting,
        "skipped_steps": engine.skipped_steps,
    }


def _note(values: Mapping[str, float]) -> str:
    """The progress line's end."""
    shown = {"loss": "loss", "kl": "KL", "ce": "CE", "learning_rate": "lr", "gradient_norm": "norm"}
    words = [f"{label} {values[name]:.4g}" for name, label in shown.items() if name in values]
    words.append(f"wait {values['data_wait_share']:.0%}")
    if values["skipped_steps"]:
        words.append(f"SKIPPED {values['skipped_steps']:.0f} steps (gradients not finite)")
    return ", ".join(words)
