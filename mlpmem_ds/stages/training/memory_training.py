"""One start of a training, from the built engine to the written weights: what its steps share, how it
resumes, saves, validates and ends.

Place in the pipeline: `train` checks everything and opens the directory, then hands over to this.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mlpmem_ds.core.files import content_hash
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import StageDirectory, UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed import AdamWSettings, Engine, SavedState, build_engine, set_parameter
from mlpmem_ds.engines.device_peak import peak_of
from mlpmem_ds.engines.ds_config import micro_batches_per_step
from mlpmem_ds.engines.online_inputs import OnlineInputs
from mlpmem_ds.engines.processes import StopRequest, gather_values
from mlpmem_ds.formats.batches import BatchReader, TrainingOrder
from mlpmem_ds.formats.checkpoint import list_checkpoints, write_weights
from mlpmem_ds.formats.checkpoint_copy import CheckpointCopier
from mlpmem_ds.models.objective import SUM_NAMES, MemoryObjective
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.curves import draw_curves
from mlpmem_ds.stages.training.inputs import TrainingInputs, provenance_of
from mlpmem_ds.stages.training.loop import DECAY_SHARE, LoopSettings, Outcome, learning_rate_at, run_steps
from mlpmem_ds.stages.training.metrics import Metrics
from mlpmem_ds.stages.training.validation import DEFAULT_POSITIONS, VALIDATIONS_A_RUN, BestWeights, Validator

_logger = logging.getLogger(__name__)
UNIT = "weights"
"""the one unit of a training's directory"""
_FLOPS_OF_A_WEIGHT = 6  # a multiplication and an addition, forward, and for each of the two gradients
_FAULTY_SHOWN = 5


class MemoryTraining:
    """One start of a training: what its steps share."""

    def __init__(
        self,
        config: Config,
        inputs: TrainingInputs,
        ds_config: Mapping[str, Any],
        num_steps: int,
        head: torch.Tensor | None,
        directory: StageDirectory,
    ) -> None:
        self.config, self.inputs, self.num_steps, self.directory = config, inputs, num_steps, directory
        self.world, self.checkpoints = directory.world, config.output / "checkpoints"
        self.fields = {
            "memory": inputs.memory.to_dict(),
            "provenance": provenance_of(config, inputs, num_steps),
        }
        self.engine = _build(config, inputs, ds_config, head, self.world)
        self.reader = _make_reader(config, inputs, self.world, micro_batches_per_step(ds_config))
        self.validator = _make_validator(config, inputs, self.world)
        if not inputs.is_online:
            self.inputs = replace(inputs, source=None)  # whose memory the training may want
        self.validate_every = 0
        if self.validator is not None:
            self.validate_every = config.validate_every or max(1, num_steps // VALIDATIONS_A_RUN)
        wants_copies = config.copy_to is not None and self.world.is_first
        self.copier = CheckpointCopier(config.copy_to, config.keep_checkpoints) if wants_copies else None  # type: ignore[arg-type]

    def run(self) -> None:
        config, engine, world = self.config, self.engine, self.world
        saved = self._resume()
        first = 0 if saved is None else saved.step
        self.best = BestWeights(config.output, () if saved is None else saved.values.get("validations", ()))
        self.metrics = Metrics(
            config.output,
            world,
            first,
            wandb_project=config.wandb_project,
            run_id=content_hash(self.directory.identity)[:16],
            description=self.directory.identity["config"],
        )
        progress = Progress(
            (self.num_steps - first) * config.batch_positions, label="training", unit="positions", world=world
        )
        stop_request = StopRequest(engine.device)
        outcome = Outcome(steps=first, reason="patience")
        if not self._has_stalled():  # it had, where a start was killed just before its end
            outcome = run_steps(
                engine,
                _arguments(self.reader, engine, first, self.num_steps),
                first=first,
                stop=self.num_steps,
                settings=self._settings(),
                save=self._save,
                stop_request=stop_request,
                progress=progress,
                metrics=self.metrics,
                validate=None if self.validator is None else self._validate,
                explain=self._explain,
            )
        stop_request.close()
        self.metrics.close()
        progress.close()
        if self.copier is not None:
            self.copier.wait()
        if outcome.reason in ("asked", "deadline"):
            self.directory.log.write("stopped", step=outcome.steps)
            if world.is_first:
                _logger.info(
                    "stopped %s and saved at step %d of %d: the same command continues",
                    "as asked" if outcome.reason == "asked" else "after --max-seconds",
                    outcome.steps,
                    self.num_steps,
                )
            return
        self._finish(outcome)

    def _resume(self) -> SavedState | None:
        """Resume as asked."""
        if self.config.resume == "auto":
            return self.engine.resume(self.checkpoints, copies=self.config.copy_to, fields=self.fields)
        if self.world.is_first:
            for path in (*list_checkpoints(self.checkpoints), *self.checkpoints.glob("step-*.damaged")):
                _logger.warning("--resume never: discarding %s", path)
                shutil.rmtree(path)
        self.engine.wait()
        return None

    def _settings(self) -> LoopSettings:
        config, engine = self.config, self.engine
        assert config.learning_rate is not None
        peak = peak_of(engine.device, engine.dtype)
        if self.world.is_first:
            _logger.info("MFU is of %.3g TFLOP/s a rank, %s", peak.flops / 1e12, peak.source)
        return LoopSettings(
            rows_per_step=config.batch_positions,
            unit="positions",
            num_steps=self.num_steps,
            log_every=config.log_every_steps,
            save_every=config.save_every_steps,
            validate_every=self.validate_every,
            max_skipped=config.max_skipped_steps,
            deadline=time.monotonic() + config.max_seconds if config.max_seconds else math.inf,
            flops_per_row=_FLOPS_OF_A_WEIGHT * self.inputs.memory.num_matrix_parameters(),
            peak_flops=sum(gather_values(peak.flops, self.world)),
            names=SUM_NAMES,
            learning_rate=partial(
                learning_rate_at,
                peak=config.learning_rate,
                num_steps=self.num_steps,
                warmup_steps=round(config.warmup_fraction * self.num_steps),
                schedule=config.schedule,
                decay_share=DECAY_SHARE if config.decay_fraction is None else config.decay_fraction,
            ),
        )

    def _save(self, step: int) -> None:
        if self.copier is not None:
            self.copier.wait()  # what it copies may be the oldest, which goes now
        values = {"batches": step, "validations": self.best.plain()}
        path = self.engine.save(
            self.checkpoints, step, fields=self.fields, values=values, keep=self.config.keep_checkpoints
        )
        self.directory.log.write("checkpoint", step=step)
        if self.world.is_first:
            self.best.remove_others()
        if self.copier is not None:
            self.copier.start(path)

    def _validate(self, step: int) -> bool:
        assert self.validator is not None
        found = self.validator.run(self.engine, step)
        self.best.add(found, self.engine, keep=self.config.selects_best)
        self.metrics.write(step, found.metrics())
        if self.world.is_first:
            _logger.info(
                "step %d: tuning perplexity of base %.3f, memory %.3f, both %.3f (lambda %.2f)%s",
                step,
                found.base_perplexity,
                found.memory_perplexity,
                found.perplexity,
                found.lmbda,
                ", the best so far" if self.best.best is found else "",
            )
        return self._has_stalled()

    def _has_stalled(self) -> bool:
        return self.best.has_stalled(self.config.early_stopping_patience or 0)

    def _explain(self, step: int) -> str:
        """Which positions of a batch are not finite."""
        mine = gather_values(self.reader.faulty_positions(step), self.world)
        faulty = sorted(position for positions in mine for position in positions)
        if not faulty:
            return ""
        shown = ", ".join(map(str, faulty[:_FAULTY_SHOWN])) + (", ..." if len(faulty) > _FAULTY_SHOWN else "")
        return f"inputs or targets of {len(faulty)} positions are not finite: {shown}"

    def _finish(self, outcome: Outcome) -> None:
        """Write the weights, the curves and the manifest."""
        config, world, best = self.config, self.world, self.best.best
        weights = (
            self.engine.whole_weights()
            if not config.selects_best
            else self.best.read()
            if world.is_first
            else {}
        )
        self.directory.run_units(
            [UNIT], lambda _, writer: _write(writer, weights, self.fields), take_over=False
        )
        if world.is_first:
            draw_curves(config.output)
            selected = best.step if best is not None and config.selects_best else outcome.steps
            if outcome.reason == "patience":
                _logger.info(
                    "stopped early at step %d; the weights are those of step %d", outcome.steps, selected
                )
            self.directory.finish(
                [UNIT],
                lambda: {
                    **self.fields,
                    "steps": outcome.steps,
                    "selected_step": selected,
                    "validations": self.best.plain(),
                    "weights_dtype": "float32",
                },
            )
        self.engine.wait()


def _build(
    config: Config,
    inputs: TrainingInputs,
    ds_config: Mapping[str, Any],
    head: torch.Tensor | None,
    world: World,
) -> Engine:
    def prepare(model: nn.Module) -> None:
        if inputs.initial is not None:
            for name, parameter in model.named_parameters():
                set_parameter(parameter, inputs.initial.tensor(name))
        if head is not None:
            set_parameter(model.head.weight, head)  # type: ignore[union-attr, arg-type]
        assert isinstance(model, MemoryObjective)
        model.recompute_activations(config.recompute_activations)
        if config.compile:
            model.compile_activations()

    mixture_lambda = config.mixture_lambda if config.ce_through == "mixture" else None
    return build_engine(
        partial(MemoryObjective, inputs.memory, alpha=config.alpha, mixture_lambda=mixture_lambda),
        config=ds_config,
        settings=AdamWSettings(weight_decay=config.weight_decay),
        seed=config.seed,
        world=world,
        prepare=prepare,
    )


def _make_reader(config: Config, inputs: TrainingInputs, world: World, num_micro_batches: int) -> BatchReader:
    online = None
    if inputs.is_online:
        assert inputs.source is not None
        online = OnlineInputs(inputs.source, inputs.corpus, inputs.point)
    return BatchReader(
        inputs.keys,
        inputs.targets if config.alpha > 0 else None,
        TrainingOrder(
            num_positions=inputs.keys.num_positions,
            block_size=inputs.keys.manifest["block_size"],
            window_blocks=config.shuffle_window_blocks,
            seed=config.seed,
            by_block=config.order == "blocks" or inputs.is_online,
        ),
        batch_positions=config.batch_positions,
        rank=world.rank,
        size=world.size,
        num_micro_batches=num_micro_batches,
        with_log_probabilities=config.ce_through == "mixture",
        inputs=online,
    )


def _make_validator(config: Config, inputs: TrainingInputs, world: World) -> Validator | None:
    if inputs.tuning is None:
        return None
    assert inputs.source is not None
    positions = config.validation_positions or DEFAULT_POSITIONS
    return Validator(inputs.source, inputs.tuning, inputs.point, positions=positions, world=world)


def _arguments(
    reader: BatchReader, engine: Engine, first: int, stop: int
) -> Iterator[tuple[list[tuple[Any, ...]], float]]:
    """Each step's micro-batches as the objective takes them, on the engine's device and in its dtype."""
    for micro_batches, seconds in reader.stream(first, stop):
        yield (
            [
                (part.inputs_NI.to(engine.device, engine.dtype), part.targets.to(engine.device))
                for part in micro_batches
            ],
            seconds,
        )


def _write(
    writer: UnitWriter, weights: Mapping[str, torch.Tensor], fields: Mapping[str, Any]
) -> dict[str, Any]:
    write_weights(writer, weights, memory=fields["memory"], provenance=fields["provenance"])
    return {"parameters": sum(tensor.numel() for tensor in weights.values())}
