"""Part of `train` and `train_base`: one training, from the built engine to the written weights.

It resumes from the newest checkpoint, runs the steps, saves, validates, keeps the best weights, stops early
or when its time is over, and writes the result. `train` and `train_base` build its parts (parts.py).
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from mlpmem_ds.core.config import plain_values
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.core.objects.contents import CHECKPOINTS
from mlpmem_ds.core.run_description import IDENTITY_FIELD
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.engines.checkpoints import discard_checkpoints
from mlpmem_ds.engines.deepspeed.config import zero_stage
from mlpmem_ds.engines.deepspeed.engine import Engine, SavedState
from mlpmem_ds.engines.deepspeed.process_group import watched_ranks
from mlpmem_ds.engines.device_feed import DeviceFeed, streams_for
from mlpmem_ds.engines.device_peak import peak_of
from mlpmem_ds.engines.processes import StopRequest, gather_values
from mlpmem_ds.formats.checkpoint_copy import CheckpointCopier
from mlpmem_ds.formats.trained_models import TrainingResult
from mlpmem_ds.formats.weight_shards import WeightFiles
from mlpmem_ds.stages.training.curves import draw_curves
from mlpmem_ds.stages.training.intervals import interval_advice
from mlpmem_ds.stages.training.loop import Hooks, LoopSettings, Outcome, Reason, run_steps
from mlpmem_ds.stages.training.metrics import Metrics
from mlpmem_ds.stages.training.options import TrainingOptions
from mlpmem_ds.stages.training.parts import Batches, Objective, Steps, Validator
from mlpmem_ds.stages.training.schedule import learning_rate_at
from mlpmem_ds.stages.training.validation import BestWeights

_logger = logging.getLogger(__name__)
_UNIT = "weights"
"""the one unit of a training's directory: the result"""
_MAX_FAULTY_SHOWN = 5


def is_complete(directory: StageDirectory, options: TrainingOptions) -> bool:
    """Whether the result has been written, which is said; asked before anything costly is built.

    Collective: rank 0 looks for all. The result is read for it, and two ranks might not see the same: then
    one would leave, and the others wait for it.
    """
    is_seen = directory.world.is_first and directory.manifest_path.is_file()
    if not gather_values(is_seen and directory.records.fault(_UNIT) is None, directory.world)[0]:
        return False
    if options.resume == "never" and directory.world.is_first:
        _logger.warning(
            "--resume never: %s is complete and nothing was done; remove it or choose another --output to"
            " train anew",
            options.output,
        )
    _logger.info("complete: %s", options.output)
    return True


def announce(
    directory: StageDirectory,
    options: TrainingOptions,
    ds_config: Mapping[str, Any],
    *,
    num_parameters: int,
    steps: Steps,
    rows: str,
    num_shared: int = 0,
) -> None:
    """Say what this start trains, and write OUTPUT/ds_config.json; rank 0. `num_shared`: parameters of the
    base that are used besides, and not trained."""
    if not directory.world.is_first:
        return
    publish_json(options.output / "ds_config.json", ds_config)
    shared = f" and the base's head ({num_shared:,} more, not trained)" if num_shared else ""
    _logger.info(
        "%s parameters%s, %s%d steps of %d %s, learning rate %g, ZeRO stage %d on %d ranks",
        f"{num_parameters:,}",
        shared,
        "at most " if options.may_end_early else "",
        steps.count,
        steps.rows,
        rows,
        options.learning_rate,
        zero_stage(ds_config),
        directory.world.size,
    )


class Training:
    """One start of a training; `run` does it.

    Args:
        engine: the objective's module.
        objective: what is minimized.
        batches: what each step takes.
        validator: None = no validation.
        options: the flags; the learning rate is a number by now.
        steps: how many, of how many rows, and how often they are validated.
        directory: the stage's.
        subject: what is trained, as plain values: part of every checkpoint, with the run's identity; one of
            another is refused.
        describe: the manifest of the result.
        write: given the files of the float32 weights, which go afterwards, writes the result; returns its
            summary. Called on rank 0.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        objective: Objective,
        batches: Batches,
        validator: Validator | None,
        options: TrainingOptions,
        steps: Steps,
        directory: StageDirectory,
        subject: Mapping[str, Any],
        describe: Callable[[TrainingResult], Manifest],
        write: Callable[[UnitWriter, WeightFiles], Mapping[str, Any]],
    ) -> None:
        self._engine, self._objective, self._batches = engine, objective, batches
        self._validator, self._options, self._steps = validator, options, steps
        self._directory, self._subject = directory, {**subject, IDENTITY_FIELD: directory.identity_sha256}
        self._describe, self._write = describe, write
        self._world, self._checkpoints = directory.world, options.output / CHECKPOINTS
        self._first = 0
        self._loop_began: float | None = None  # until a checkpoint was saved
        self._copier = None
        if options.copy_to is not None and self._world.is_first:
            self._copier = CheckpointCopier(options.copy_to, options.keep_checkpoints)

    def run(self) -> None:
        """Train until the end, or until a stop that the same command continues.

        Raises:
            RanksLost: another rank has ended or was cut off.
        """
        with watched_ranks(self._world):
            self._run()

    def _run(self) -> None:
        saved = self._resume()
        first, values = (0, {}) if saved is None else (saved.step, saved.values)
        if saved is None and self._world.is_first:
            self._forget_result()
        self._batches.continue_from(values.get("reader"))
        self._best = BestWeights(self._options.output, values.get("validations", ()))
        if saved is not None and self._options.selects_best:
            self._restore_best(saved)
        self._began = time.monotonic() - values.get("seconds", 0.0)
        self._metrics = Metrics(
            self._options.output,
            self._world,
            first,
            wandb_project=self._options.wandb_project,
            run_id=self._directory.identity_sha256[:16],
            description=plain_values(self._options),
        )
        outcome = self._run_steps(first, values.get("reason"))
        self._metrics.close()
        if outcome.is_over:
            self._finish(outcome)
        else:
            self._say_stopped(outcome)
        if self._copier is not None:
            self._copier.wait()
        self._engine.wait()  # no rank leaves while rank 0 copies

    # -- the start

    def _resume(self) -> SavedState | None:
        """Load the newest checkpoint; with --resume never, discard all of them, and their copies."""
        copies, subject = self._options.copy_to, self._subject
        if self._options.resume == "auto":
            return self._engine.resume(self._checkpoints, copies=copies, subject=subject)
        discard_checkpoints(self._checkpoints, copies=copies, subject=subject, world=self._world)
        return None

    def _forget_result(self) -> None:
        """That of an earlier start whose checkpoints are gone: this one's is written in its place.

        Not where there was a manifest, since later stages may have read it: it has to come out the same.
        """
        if not self._directory.manifest_path.is_file():
            self._directory.records.path(_UNIT).unlink(missing_ok=True)

    def _restore_best(self, saved: SavedState) -> None:
        """Of what the checkpoint names as the best, have the weights, or forget it."""
        is_there = self._world.is_first and self._best.restore(saved.path)
        if gather_values(is_there, self._world)[0]:
            return
        if self._world.is_first:
            _logger.warning(
                "the weights of the best validation until step %d are neither in %s nor in %s: the"
                " validations until then are forgotten, and the best of those to come is written",
                saved.step,
                self._options.output / "best",
                saved.path,
            )
        self._best.forget()

    def _settings(self) -> LoopSettings:
        options, engine, steps = self._options, self._engine, self._steps
        assert options.learning_rate is not None
        peak_flops = 0.0
        if self._objective.flops_per_row:
            peak = peak_of(engine.device, engine.dtype)
            peak_flops = sum(gather_values(peak.flops, self._world))
            if self._world.is_first:
                _logger.info("MFU is of %.3g TFLOP/s a rank, %s", peak.flops / 1e12, peak.source)
        return LoopSettings(
            steps=steps,
            rows=self._objective.rows,
            sums=self._objective.sums,
            learning_rate=partial(
                learning_rate_at,
                peak=options.learning_rate,
                num_steps=steps.count,
                warmup_steps=round(options.warmup_fraction * steps.count),
                schedule=options.schedule,
                decay_share=options.decay_share,
            ),
            log_every=options.log_every_steps,
            save_every=options.save_every_steps,
            max_skipped=options.max_skipped_steps,
            stops_at=_moment(time.monotonic(), options.stop_after_seconds),
            ends_at=_moment(self._began, options.time_budget_seconds),
            flops_per_row=self._objective.flops_per_row,
            peak_flops=peak_flops,
        )

    # -- the steps

    def _run_steps(self, first: int, saved_reason: Reason | None) -> Outcome:
        """The steps from `first` on, whose checkpoint was saved for this reason."""
        # Over in an earlier start, whose result is not complete, or is damaged.
        if self._has_stalled():
            return Outcome(steps=first, reason="patience")
        if saved_reason == "budget":
            return Outcome(steps=first, reason="budget")
        rows_left = (self._steps.count - first) * self._steps.rows
        progress = Progress(rows_left, label="training", unit=self._objective.rows, world=self._world)
        self._directory.log_phase(self._steps.count, missing=self._steps.count - first, of="steps")
        self._first, self._loop_began = first, time.monotonic()
        with StopRequest(self._engine.device) as stop_request:
            outcome = run_steps(
                self._engine,
                self._arguments(first),
                first=first,
                settings=self._settings(),
                hooks=Hooks(
                    save=self._save,
                    validate=None if self._validator is None else self._validate,
                    explain=self._explain,
                ),
                stop_request=stop_request,
                progress=progress,
                metrics=self._metrics,
            )
        progress.close()
        return outcome

    def _arguments(self, first: int) -> Iterator[tuple[list[tuple[Any, ...]], float]]:
        """Each step's micro-batches as the forward takes them, and the seconds waited for them."""
        device, dtype = self._engine.device, self._engine.dtype
        feed = DeviceFeed(
            lambda part: self._objective.arguments(part, device, dtype),
            streams_for(device, may_run_ahead=self._batches.may_run_ahead),
        )
        return feed.stream(self._batches.stream(first, self._steps.count))

    def _save(self, step: int, reason: Reason | None) -> None:
        start = time.monotonic()
        self._engine.save(
            self._checkpoints,
            step,
            subject=self._subject,
            values={
                "batches": step,
                "reader": self._batches.state_after(step),
                "validations": self._best.to_json(),
                "seconds": time.monotonic() - self._began,
                "reason": reason,
            },
            keep=self._options.keep_checkpoints,
            best=self._best.held() if self._options.selects_best else None,
            begin_copy=None if self._copier is None else self._copier.start,
        )
        seconds = time.monotonic() - start
        self._directory.log.write("checkpoint", step=step, seconds=round(seconds, 3))
        if self._world.is_first:
            self._advise(step, seconds, until=start)
            self._best.remove_others()

    def _advise(self, step: int, seconds: float, *, until: float) -> None:
        """Say once a start how often to save, from the first checkpoint and the steps before it."""
        if self._loop_began is not None and step > self._first:
            step_seconds = (until - self._loop_began) / (step - self._first)
            _logger.info("%s", interval_advice(seconds, step_seconds))
        self._loop_began = None

    def _validate(self, step: int) -> bool:
        assert self._validator is not None
        validation = self._validator.run(self._engine, step)
        self._best.add(validation, self._engine, keep=self._options.selects_best)
        self._metrics.write(step, validation.metrics())
        if self._world.is_first:
            is_best = ", the best so far" if self._best.best is validation else ""
            _logger.info("step %d: %s%s", step, validation, is_best)
        return self._has_stalled()

    def _has_stalled(self) -> bool:
        return self._best.has_stalled(self._options.early_stopping_patience)

    def _explain(self, step: int) -> str:
        """Which positions of a step are not finite, of all ranks; collective."""
        shares = gather_values(self._batches.faulty_positions(step), self._world)
        faulty = sorted(position for share in shares for position in share)
        if not faulty:
            return ""
        shown = ", ".join(map(str, faulty[:_MAX_FAULTY_SHOWN]))
        rest = ", ..." if len(faulty) > _MAX_FAULTY_SHOWN else ""
        return f"inputs or targets of {len(faulty)} positions are not finite: {shown}{rest}"

    # -- the end

    def _say_stopped(self, outcome: Outcome) -> None:
        self._directory.log.write("stopped", step=outcome.steps)
        if self._world.is_first:
            _logger.info(
                "stopped %s and saved at step %d of %d: the same command continues",
                "as asked" if outcome.reason == "asked" else "after --stop-after-seconds",
                outcome.steps,
                self._steps.count,
            )

    def _finish(self, outcome: Outcome) -> None:
        """Write the weights, the curves and the manifest."""
        best = self._best.best if self._options.selects_best else None
        selected = outcome.steps if best is None else best.step
        place = self._options.output / ".weights.tmp"
        if self._world.is_first:
            shutil.rmtree(place, ignore_errors=True)  # of a start that was killed
        files = self._engine.write_weights(place) if best is None else self._best.files()
        self._directory.run_units([_UNIT], lambda _, writer: self._write(writer, files), take_over=False)
        if self._world.is_first:
            shutil.rmtree(place, ignore_errors=True)
            draw_curves(self._options.output)
            if outcome.reason in ("patience", "budget"):
                _logger.info(
                    "stopped %s at step %d; the weights are those of step %d",
                    "early" if outcome.reason == "patience" else "after --time-budget-seconds",
                    outcome.steps,
                    selected,
                )
            result = TrainingResult(
                steps=outcome.steps,
                rows_per_step=self._steps.rows,
                selected_step=selected,
                validations=tuple(self._best.to_json()),
            )
            self._directory.complete([_UNIT], lambda: self._describe(result))
        self._engine.wait()


def _moment(start: float, seconds: float | None) -> float:
    """So many seconds after a moment of time.monotonic(); never with None."""
    return math.inf if seconds is None else start + seconds
