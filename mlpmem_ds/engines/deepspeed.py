"""DeepSpeed: process groups, its configuration file, and the ZeRO engine. No other file imports deepspeed.

Place in the pipeline: under `train` and `train_base`. The library is imported inside functions, because it
reads its environment (DS_ACCELERATOR) while it is imported. What DeepSpeed 0.19 does silently and we refuse
or repair: unknown keys and a left "auto" are accepted; `latest` is written before every rank has finished; a
missing checkpoint restarts from scratch; another world size or ZeRO stage cannot be loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import importlib
import io
import json
import logging
import os
import random
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.checkpoints import find_checkpoint, save_checkpoint
from mlpmem_ds.engines.ds_config import check_sections, compute_dtype, resolve_numbers, zero_stage
from mlpmem_ds.engines.processes import keep_freed_memory, leave_process_group, meeting_point, wait_for_all
from mlpmem_ds.engines.zero_state import ZeroState, load_other_layout, whole_shape, whole_size, whole_weights
from mlpmem_ds.formats.checkpoint import Checkpoint

_logger = logging.getLogger(__name__)


def import_deepspeed() -> Any:
    """Import the library, on the CPU accelerator where there is no CUDA, and silence its chatter."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        library = importlib.import_module("deepspeed")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # PyTorch 2.13 has new names for what DeepSpeed calls: a warning of each rank in each run.
    warnings.filterwarnings("ignore", message="`torch\\.distributed", category=FutureWarning)
    # A just-in-time C++ build that only inference uses: 31 s, and fatal where there is no compiler.
    compatible = getattr(importlib.import_module("deepspeed.ops"), "__compatible_ops__", {})
    compatible["deepspeed_shm_comm"] = False
    return library


def set_up_distributed(world: World, *, timeout: datetime.timedelta = datetime.timedelta(minutes=10)) -> None:
    """Start the process group (NCCL with CUDA, else gloo) whatever launcher started us; a world of one needs
    none.

    It is left when the process ends. DeepSpeed looks for the rank in the environment later too; a second call
    only puts it there.

    Raises:
        UserError: the ranks cannot find each other: MASTER_ADDR is unknown.
    """
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    if torch.distributed.is_initialized():
        return
    deepspeed = import_deepspeed()
    address, port = meeting_point(world, os.environ)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    keep_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    atexit.register(leave_process_group)


def resolve_ds_config(
    path: Path,
    *,
    batch: int,
    batch_flag: str,
    world_size: int,
    max_micro_batch: int,
    gradient_clipping: float | None,
) -> dict[str, Any]:
    """`ds_config.resolve_numbers`, and DeepSpeed's own check of the sections; nothing is written.

    Raises:
        UserError: not JSON, an unknown or removed key, an "auto" that nobody resolves, numbers or values that
            do not fit.
    """
    resolved = resolve_numbers(
        path,
        batch=batch,
        batch_flag=batch_flag,
        world_size=world_size,
        max_micro_batch=max_micro_batch,
        gradient_clipping=gradient_clipping,
    )
    import_deepspeed()
    check_sections(path, resolved, importlib.import_module)
    return resolved


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """The learning rate comes with each step."""

    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What a resumed run starts from: steps done, and the plain values given at the save."""

    step: int
    values: dict[str, Any]


class Engine:
    """A model under ZeRO: steps, checkpoints, whole weights. Every method is collective: all ranks call it
    alike."""

    def __init__(self, engine: Any, config: Mapping[str, Any], world: World) -> None:
        self._engine, self._config, self._world = engine, config, world
        self.stage = zero_stage(config)
        self.dtype = compute_dtype(config)
        self.device: torch.device = torch.device(engine.device)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that speaks."""
        return self._world.is_first

    @property
    def _state(self) -> ZeroState:
        return ZeroState(
            module=self.module,
            wrapper=self._engine.optimizer,
            optimizer=self._engine.basic_optimizer,
            fragments=importlib.import_module("deepspeed.utils"),
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
        self, root: Path, step: int, *, fields: Mapping[str, Any], values: Mapping[str, Any], keep: int
    ) -> Path:
        """Publish the checkpoint of `step` below `root` and remove all but the newest `keep`; where it is.

        Args:
            root: OUTPUT/checkpoints.
            step: optimizer steps done.
            fields: the manifest's description of what is trained.
            values: plain values that `resume` gives back, the same on every rank.
            keep: checkpoints kept.

        Raises:
            UserError: the disk is full, or refuses the files for another reason; older checkpoints stay.
        """
        described = {
            **fields,
            "world": self._world.size,
            "zero_stage": self.stage,
            "skipped_steps": self.skipped_steps,
            "values": dict(values),
        }
        return save_checkpoint(
            root,
            step,
            write=lambda tag: self._engine.save_checkpoint(
                str(root), tag=tag, client_state={"mlpmem": {"step": step}}, save_latest=False
            ),
            described=described,
            num_parameters=sum(whole_size(parameter) for parameter in self.module.parameters()),
            keep=keep,
            world=self._world,
        )

    def resume(
        self, root: Path, *, copies: Path | None = None, fields: Mapping[str, Any] | None = None
    ) -> SavedState | None:
        """Load the newest checkpoint whose files match its manifest; None where there is none at all.

        Args:
            root: OUTPUT/checkpoints.
            copies: a second place of the same checkpoints, or None.
            fields: the manifest's description of what is trained; a copy of another training is refused.

        Raises:
            UserError: there are checkpoints and none of them is whole, or the ZeRO stage cannot be changed to
                this one.
        """
        checkpoint = find_checkpoint(root, copies=copies, fields=fields or {}, world=self._world)
        if checkpoint is None:
            return None
        self._load(checkpoint)
        _logger.info("resuming from %s (step %d)", checkpoint.path, checkpoint.step)
        return SavedState(step=checkpoint.step, values=checkpoint.manifest["values"])

    def _load(self, checkpoint: Checkpoint) -> None:
        saved_stage, saved_world = checkpoint.manifest["zero_stage"], checkpoint.manifest["world"]
        same_layout = saved_stage == self.stage and (saved_world == self._world.size or self.stage == 0)
        if same_layout:
            path, _ = self._engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
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
                "the checkpoint is of %d ranks at ZeRO stage %d, this run has %d at stage %d: converting",
                saved_world,
                saved_stage,
                self._world.size,
                self.stage,
            )
        skipped = checkpoint.manifest["skipped_steps"]
        load_other_layout(
            checkpoint,
            self._state,
            steps_applied=checkpoint.step - skipped,
            convert=_convert_to_universal,
            set_parameter=set_parameter,
        )
        self._engine.global_steps, self._engine.skipped_steps = checkpoint.step, skipped

    # -- weights

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The float32 master weights by name, on the CPU of rank 0; an empty dict elsewhere.

        Rank 0 needs 4 bytes a parameter of memory.
        """
        return whole_weights(self._state)

    def wait(self) -> None:
        """Until every rank is here."""
        wait_for_all(self._world)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks."""
        if self._world.size > 1:
            torch.distributed.all_reduce(values)
        return values / self._world.size


def build_engine(
    make_model: Callable[[], nn.Module],
    *,
    config: Mapping[str, Any],
    settings: AdamWSettings,
    seed: int,
    world: World,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Engine:
    """Make the model (under zero.Init at stage 3, so that no rank ever holds the whole) and wrap it.

    Args:
        make_model: each leaf must initialize itself in its own __init__.
        config: resolved.
        settings: of the optimizer.
        seed: of the initial weights, the same on all ranks.
        world: this rank.
        prepare: called with the model before it is wrapped; changes parameters through `set_parameter` only.
    """
    deepspeed = import_deepspeed()
    config = json.loads(json.dumps(config))  # DeepSpeed writes into it
    random.seed(seed)
    torch.manual_seed(seed)
    with (
        deepspeed.zero.Init(config_dict_or_path=config)
        if zero_stage(config) == 3
        else contextlib.nullcontext()
    ):
        model = make_model()
    if prepare is not None:
        prepare(model)
    model.train()  # a model that was loaded from files evaluates
    optimizer = _make_optimizer(model, config, settings)
    with contextlib.redirect_stdout(io.StringIO()):  # stage 1 prints its memory in a dozen lines
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
    if world.size == 1 and hasattr(engine.optimizer, "get_grads_for_reduction"):
        # Stage 1 would round the float32 sums to what ranks exchange, and back, though there is nobody to
        # exchange them with.
        engine.enable_backward_allreduce = False
    return Engine(engine, config, world)


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
    offloads = (
        config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    )
    if offloads and config.get("zero_force_ds_cpu_optimizer", True):
        adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        optimizer: torch.optim.Optimizer = adam(groups, lr=0.0, betas=settings.betas, eps=settings.epsilon)
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.epsilon, fused=True)


def set_parameter(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Give a parameter these values, whole or cut in shards; called by every rank with the same values."""
    deepspeed = import_deepspeed()
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(values.reshape(parameter.shape))


def _convert_to_universal(source: Path, target: Path) -> None:
    """DeepSpeed's converter, without its prints; one process."""
    shutil.rmtree(target, ignore_errors=True)
    converter = importlib.import_module("deepspeed.checkpoint.ds_to_universal")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        converter.main(
            Namespace(
                input_folder=str(source),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
