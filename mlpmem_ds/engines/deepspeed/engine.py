"""A model under ZeRO: optimizer steps, checkpoints, weights in files.

Part of `train` and `train_base`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.checkpoints import find_checkpoint, save_checkpoint
from mlpmem_ds.engines.deepspeed.config import compute_dtype, offloads_optimizer, zero_stage
from mlpmem_ds.engines.deepspeed.library import import_deepspeed, import_part, silenced
from mlpmem_ds.engines.deepspeed.saved_shards import refuse_foreign_code
from mlpmem_ds.engines.deepspeed.zero_state import (
    ZeroState,
    has_same_layout,
    load_other_layout,
    whole_shape,
    whole_size,
    write_whole_weights,
)
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.processes import gather_values, sum_over_ranks, wait_for_all
from mlpmem_ds.formats.checkpoint import (
    BEST_WEIGHTS,
    Checkpoint,
    CheckpointManifest,
    bytes_of_parameter,
)
from mlpmem_ds.formats.weight_shards import WeightFiles

_logger = logging.getLogger(__name__)
MAX_WEIGHTS_BYTES = 5 * 10**9
"""of a file of weights, which one rank holds in its host's memory"""


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """The learning rate comes with each step."""

    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What a resumed run starts from: the checkpoint, steps done, and the plain values given at the save."""

    path: Path
    step: int
    values: dict[str, Any]


class Engine:
    """A model under ZeRO. Every method is collective: all ranks call it alike."""

    def __init__(
        self, engine: Any, config: Mapping[str, Any], world: World, *, keeps_frozen: bool = True
    ) -> None:
        self._engine, self._config, self._world = engine, config, world
        self._keeps_frozen = keeps_frozen
        self.stage = zero_stage(config)
        self.dtype = compute_dtype(config)
        self.device: torch.device = torch.device(engine.device)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs for all."""
        return self._world.is_first

    @property
    def _state(self) -> ZeroState:
        return ZeroState(
            module=self.module,
            wrapper=self._engine.optimizer,
            optimizer=self._engine.basic_optimizer,
            stage=self.stage,
            world=self._world,
        )

    @property
    def module(self) -> nn.Module:
        """The wrapped model; under ZeRO-3 its parameters are empty outside a forward."""
        module: nn.Module = self._engine.module
        return module

    def forward(self, *arguments: Any) -> Any:
        return self._engine(*arguments)

    def train_step(
        self, micro_batches: Sequence[tuple[Any, ...]], learning_rate: float
    ) -> list[tuple[torch.Tensor, ...]]:
        """One optimizer step over this rank's micro-batches; what each forward returned, detached (loss
        first)."""
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        outputs = []
        for number, arguments in enumerate(micro_batches, start=1):
            output = self._engine(*arguments)
            self._engine.backward(output[0])
            is_skipped = self.stage == 0 and number == len(micro_batches) and not self._has_finite_gradients()
            with self._without_update() if is_skipped else contextlib.nullcontext():
                self._engine.step()
            outputs.append(tuple(tensor.detach() for tensor in output))
        return outputs

    def _has_finite_gradients(self) -> bool:
        """Stage 0 would apply any; they are the same on every rank by now."""
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())

    @contextlib.contextmanager
    def _without_update(self) -> Iterator[None]:
        """For a step that counts, and changes neither weights nor moments."""
        optimizer, update = self._engine.optimizer, self._engine.optimizer.step
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        optimizer.step = lambda *_, **__: None
        try:
            yield
        finally:
            optimizer.step = update
        self._engine.skipped_steps += 1

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """For forwards without gradients; every rank must run as many."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    @property
    def gradient_norm(self) -> float:
        """Of the latest step, before clipping; NaN where DeepSpeed does not know it."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients were not finite, and that changed nothing."""
        return int(self._engine.skipped_steps)

    # -- checkpoints

    def save(
        self,
        root: Path,
        step: int,
        *,
        subject: Mapping[str, Any],
        values: Mapping[str, Any],
        keep: int,
        best: WeightFiles | None = None,
        begin_copy: Callable[[Path], Collection[Path]] | None = None,
    ) -> Path:
        """Publish the checkpoint of `step` below `root` and remove all but the newest `keep`; where it is.

        Args:
            root: OUTPUT/checkpoints.
            step: optimizer steps done.
            subject: what is trained, as plain values.
            values: plain values that `resume` gives back, the same on every rank.
            keep: checkpoints kept.
            best: weights that the checkpoint is to hold too, in its folder `BEST_WEIGHTS`.
            begin_copy: see `save_checkpoint`.

        Raises:
            UserError: the disk is full, or refuses the files for another reason; older checkpoints stay.
        """

        def describe(files: tuple[FileRecord, ...]) -> CheckpointManifest:
            return CheckpointManifest(
                step=step,
                world=self._world.size,
                zero_stage=self.stage,
                skipped_steps=self.skipped_steps,
                subject=subject,
                values=values,
                files=files,
            )

        num_parameters = sum(
            whole_size(parameter)
            for parameter in self.module.parameters()
            if parameter.requires_grad or self._keeps_frozen
        )

        def write(tag: str) -> None:
            self._write_checkpoint(root, tag, step)
            if best is not None and self._world.is_first:
                best.link_to(root / tag / BEST_WEIGHTS)

        return save_checkpoint(
            root,
            step,
            write=write,
            describe=describe,
            num_bytes=num_parameters * bytes_of_parameter(self.dtype.itemsize, zero_stage=self.stage),
            keep=keep,
            world=self._world,
            begin_copy=begin_copy,
        )

    def _write_checkpoint(self, root: Path, tag: str, step: int) -> None:
        """This rank's files. DeepSpeed's own collectives after the writing begin when every rank has
        written."""
        wrapper, files = self._engine.optimizer, self._engine.checkpoint_engine

        def after_all(call: Callable[..., Any]) -> Callable[..., Any]:
            def waiting(*arguments: Any) -> Any:
                wait_for_all(self._world)
                return call(*arguments)

            return waiting

        places = [(wrapper, "checkpoint_event_epilogue"), (files, "commit")]
        with contextlib.ExitStack() as patches:
            for owner, name in places:
                if hasattr(owner, name):
                    setattr(owner, name, after_all(getattr(owner, name)))
                    patches.callback(delattr, owner, name)  # the class's own is seen again
            self._engine.save_checkpoint(
                str(root),
                tag=tag,
                client_state={"mlpmem": {"step": step}},
                save_latest=False,
                exclude_frozen_parameters=not self._keeps_frozen,
            )

    def resume(
        self, root: Path, *, copies: Path | None = None, subject: Mapping[str, Any] | None = None
    ) -> SavedState | None:
        """Load the newest checkpoint whose files match its manifest; None where none was ever saved.

        Args:
            root: OUTPUT/checkpoints.
            copies: a second place of the same checkpoints, or None.
            subject: what is trained, as plain values; a checkpoint of another is refused.

        Raises:
            UserError: there are checkpoints and none of them is whole, or the ZeRO stage cannot be changed to
                this one.
        """
        checkpoint = find_checkpoint(root, copies=copies, subject=subject or {}, world=self._world)
        if checkpoint is None:
            return None
        self._load(checkpoint)
        _logger.info("resuming from %s (step %d)", checkpoint.path, checkpoint.step)
        return SavedState(path=checkpoint.path, step=checkpoint.step, values=dict(checkpoint.manifest.values))

    def _load(self, checkpoint: Checkpoint) -> None:
        files = [file for file in checkpoint.files if file.suffix == ".pt"]
        mine = files[self._world.rank :: self._world.size]
        faults = gather_values(refuse_foreign_code(mine), self._world)  # DeepSpeed unpickles anything
        if fault := next(filter(None, faults), None):
            raise DamagedDataError(fault)
        saved_stage, saved_world = checkpoint.manifest.zero_stage, checkpoint.manifest.world
        if saved_stage == self.stage and self._takes_groups_of(checkpoint):
            path, _ = self._engine.load_checkpoint(
                str(checkpoint.path.parent),
                tag=checkpoint.path.name,
                load_module_strict=self._keeps_frozen,
            )
            if path is None:
                raise UserError(
                    f"DeepSpeed found nothing to load in {checkpoint.path}: restore it from a copy"
                )
            return
        if 0 in (saved_stage, self.stage):
            raise UserError(
                f"{checkpoint.path} was saved under ZeRO stage {saved_stage} and this run uses stage "
                f"{self.stage}: stages 1, 2 and 3 can be exchanged, stage 0 cannot; use the same stage"
            )
        if self._world.is_first:
            _logger.info(
                "the checkpoint is of %d ranks at ZeRO stage %d, this run has %d at stage %d%s: each reads"
                " its part",
                saved_world,
                saved_stage,
                self._world.size,
                self.stage,
                " and other groups" if (saved_stage, saved_world) == (self.stage, self._world.size) else "",
            )
        skipped = checkpoint.manifest.skipped_steps
        load_other_layout(
            checkpoint,
            self._state,
            steps_applied=checkpoint.step - skipped,
        )
        self._engine.global_steps, self._engine.skipped_steps = checkpoint.step, skipped

    def _takes_groups_of(self, checkpoint: Checkpoint) -> bool:
        """Whether DeepSpeed can load a checkpoint of this stage; collective."""
        if self.stage == 0:  # every rank's file holds everything by name
            return True
        return has_same_layout(checkpoint, self._state, self._engine._get_zero_param_shapes())

    # -- weights

    def write_weights(self, root: Path, stem: str = "model") -> WeightFiles:
        """Write the float32 master weights below `root`; where they are. See `write_whole_weights`.

        Frozen ones are among them unless the engine was built without (`keeps_frozen`).

        Raises:
            UserError: they could not be written.
        """
        if self._world.is_first:
            root.mkdir(parents=True, exist_ok=True)
        wait_for_all(self._world)
        try:
            write_whole_weights(
                self._state, root, stem, max_bytes=MAX_WEIGHTS_BYTES, with_frozen=self._keeps_frozen
            )
        except OSError as error:
            raise UserError(
                f"the weights could not be written below {root} ({error}): free some space, or raise the"
                " quota or the limit on files' sizes (ulimit -f), and run the same command again, it"
                " continues from the newest checkpoint"
            ) from error
        return WeightFiles(root=root, stem=stem)

    def wait(self) -> None:
        """Until every rank calls this."""
        wait_for_all(self._world)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks; `values` is overwritten."""
        return sum_over_ranks(values, self._world) / self._world.size


def build_engine(
    make_model: Callable[[], nn.Module],
    *,
    config: Mapping[str, Any],
    settings: AdamWSettings,
    seed: int,
    world: World,
    prepare: Callable[[nn.Module], None] | None = None,
    keeps_frozen: bool = True,
) -> Engine:
    """Make the model and wrap it.

    It is made under zero.Init at stage 3, so that no rank ever holds the whole, and at the other stages on
    the device that computes: eight ranks of 7 B in float32 would take 224 GB of their host's memory.

    Args:
        make_model: each leaf must initialize itself in its own __init__.
        config: resolved.
        settings: of the optimizer.
        seed: of the initial weights, the same on all ranks.
        world: this rank.
        prepare: called with the model before it is wrapped; changes parameters through `set_parameter` only.
        keeps_frozen: whether checkpoints and files of weights hold the weights without a gradient too. False
            where `make_model` gives them again at every start.
    """
    deepspeed = import_deepspeed()
    config = json.loads(json.dumps(config))  # DeepSpeed writes into it
    random.seed(seed)
    torch.manual_seed(seed)
    with (
        deepspeed.zero.Init(config_dict_or_path=config)
        if zero_stage(config) == 3
        else device_of_rank("auto", world)
    ):
        model = make_model()
    if prepare is not None:
        prepare(model)
    model.train()  # a model that was loaded from files evaluates
    optimizer = _make_optimizer(model, config, settings)
    with silenced():  # stage 1 prints its memory in a dozen lines
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
    if world.size == 1 and hasattr(engine.optimizer, "get_grads_for_reduction"):
        # Stage 1 would round the float32 sums to what ranks exchange, and back, though one rank exchanges
        # nothing.
        engine.enable_backward_allreduce = False
    return Engine(engine, config, world, keeps_frozen=keeps_frozen)


def _make_optimizer(
    model: nn.Module, config: Mapping[str, Any], settings: AdamWSettings
) -> torch.optim.Optimizer:
    """AdamW at learning rate 0 (each step sets it); biases and norms are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if len(whole_shape(p)) > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if len(whole_shape(p)) <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if offloads_optimizer(config) and config.get("zero_force_ds_cpu_optimizer", True):
        adam = import_part("ops.adam").DeepSpeedCPUAdam
        optimizer: torch.optim.Optimizer = adam(groups, lr=0.0, betas=settings.betas, eps=settings.epsilon)
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.epsilon, fused=True)
