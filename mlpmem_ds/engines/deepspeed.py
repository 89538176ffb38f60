"""DeepSpeed: process groups, its configuration file, the ZeRO engine, and checkpoints. No other file imports deepspeed.

Place in the pipeline: under `train` and `train_base`. The library is imported inside functions, because it reads its
environment (DS_ACCELERATOR) while it is imported. What DeepSpeed 0.19 does silently and we refuse or repair:
unknown keys and a left "auto" are accepted; `latest` is written before every rank has finished; a missing checkpoint
restarts from scratch; another world size or ZeRO stage cannot be loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import difflib
import importlib
import io
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.checkpoint import (
    Checkpoint,
    checkpoint_name,
    fault_of_checkpoint,
    list_checkpoints,
    publish_checkpoint,
    read_checkpoint,
    record_and_flush,
    remove_old_checkpoints,
    remove_unfinished,
    set_aside,
)

_logger = logging.getLogger(__name__)
_AUTO = "auto"
_MICRO_BATCH, _ACCUMULATION = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
_CLIPPING = "gradient_clipping"
_OWNED = (_MICRO_BATCH, _ACCUMULATION, _CLIPPING)
_KNOWN = frozenset(
    {
        *_OWNED,
        "train_batch_size",
        "managed_gradient_accumulation",
        "prescale_gradients",
        "gradient_predivide_factor",
        "communication_data_type",
        "bf16",
        "data_types",
        "torch_autocast",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "checkpoint",
        "aio",
        "activation_checkpointing",
        "comms_logger",
        "flops_profiler",
        "wall_clock_breakdown",
        "memory_breakdown",
        "steps_per_print",
        "dump_state",
        "compile",
        "log_level",
        "disable_allgather",
        "timers",
    }
)
# Top-level keys that DeepSpeed knows or knew, and what to do instead.
_REFUSED = {
    "optimizer": "remove it: the optimizer is AdamW, set by --learning-rate and --weight-decay",
    "scheduler": "remove it: the schedule is set by --schedule and --warmup-fraction",
    "fp16": "remove it and use bf16: the loss here is never scaled",
    "elasticity": "remove it: --batch-positions fixes the batch at any number of GPUs, and a rerun resumes on another",
    "nebula": "remove it: checkpoints are published by this program",
    "amp": "remove it and use bf16",
    "compression_training": "remove it: DeepSpeed's compression is gone",
    "quantize_training": "remove it: DeepSpeed's quantised training is gone",
    "sparse_gradients": "remove it: gradients here are dense",
    "sparse_attention": "remove it: the memory has no attention",
    "eigenvalue": "remove it: DeepSpeed no longer has it",
    "graph_harvesting": "remove it: DeepSpeed no longer has it",
    "curriculum_learning": "remove it: DeepSpeed no longer has it",
    "data_efficiency": "remove it: the order of the data is set by --seed and --shuffle-window-blocks",
    "progressive_layer_drop": "remove it: DeepSpeed no longer has it",
    "tensorboard": "remove it: OUTPUT/tensorboard is written by this program",
    "csv_monitor": "remove it: OUTPUT/metrics.jsonl is written by this program",
    "wandb": "remove it: OUTPUT/metrics.jsonl and OUTPUT/tensorboard are written by this program",
    "autotuning": "remove it and set --micro-batch-positions",
}
_REFUSED_ZERO = {
    "mics_shard_size": "remove it: DeepSpeed no longer has MiCS; zero_hpz_partition_size keeps shards inside a node",
    "mics_hierarchical_params_gather": "remove it: DeepSpeed no longer has MiCS",
    "zeropp_loco_param": "remove it: DeepSpeed no longer has it",
    "elastic_checkpoint": "remove it: another world size resumes by itself",
}
# The lists of this rank's flat float32 weights in DeepSpeed's ZeRO-3, ZeRO-1/2 and bf16 ZeRO-1 optimizers.
_FLAT_MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
_SECONDS_FOR_THREADS = 0.1
_MOMENTS = ("exp_avg", "exp_avg_sq")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


# ---------------------------------------------------------------------------------------------- processes


def import_deepspeed() -> Any:
    """Import the library, on the CPU accelerator where there is no CUDA, and silence its chatter."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        library = importlib.import_module("deepspeed")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A just-in-time C++ build that only inference uses: 31 s, and fatal where there is no compiler.
    compatible = getattr(importlib.import_module("deepspeed.ops"), "__compatible_ops__", {})
    compatible["deepspeed_shm_comm"] = False
    return library


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: a training step frees and asks again for the same ones."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def set_up_distributed(world: World, *, timeout: datetime.timedelta = datetime.timedelta(minutes=10)) -> None:
    """Start the process group (NCCL with CUDA, else gloo) whatever launcher started us; a world of one needs none.

    It is left when the process ends; a second call changes nothing.

    Raises:
        UserError: the ranks cannot find each other: MASTER_ADDR is unknown.
    """
    if torch.distributed.is_initialized():
        return
    deepspeed = import_deepspeed()
    address, port = _meeting_point(world, os.environ)
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    _keep_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    """Before the interpreter ends: leave the group, and let gloo's threads drop the last tensors.

    They take Python's lock to do so, and one that asks for it while the interpreter is being taken down aborts the
    process ("terminate called without an active exception", one start in four with torch 2.13).
    """
    if torch.distributed.is_initialized():
        time.sleep(_SECONDS_FOR_THREADS)
        torch.distributed.destroy_process_group()
    time.sleep(_SECONDS_FOR_THREADS)


def _meeting_point(world: World, environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of rank 0, which every rank works out alike."""
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if world.size == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", probe.getsockname()[1]
    job = next(
        (
            environment[name]
            for name in ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
            if name in environment
        ),
        "",
    )
    port = int(environment.get("MASTER_PORT", 20000 + zlib.crc32(job.encode()) % 20000))
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"], port
    if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(world.size) or environment.get("SLURM_NNODES") == "1":
        return "127.0.0.1", port
    if "SLURM_JOB_NODELIST" in environment:
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
            names = subprocess.run(
                ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            return names[0], port
    raise UserError(
        f"{world.size} ranks on several hosts do not know where to meet: set MASTER_ADDR to the name of "
        "rank 0's host (and MASTER_PORT to a free port), or start with torchrun or deepspeed"
    )


def gather_values(value: Any, world: World) -> list[Any]:
    """Every rank's plain value, in rank order."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(values, value)
    return values


class StopRequest:
    """SIGTERM and SIGUSR1 (and the death of the deepspeed launcher) ask for a stop at the next step that all agree on.

    The answer of a step is the one that was asked at the step before: nobody waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._asked = False
        self._device = device
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
        self._runner = _launcher_of_launcher()

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked by the step before; to be called by every rank once a step."""
        answer = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            answer = bool(flag.item())
        # The deepspeed command does not pass SIGTERM on; its death is the only thing that the ranks can see.
        if self._runner is not None and _launcher_of_launcher() != self._runner:
            self._asked = True
        flag = torch.tensor([float(self._asked)], device=self._device)
        self._pending = flag, torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)
        return answer

    def close(self) -> None:
        """Give the signals back."""
        if self._pending is not None:
            self._pending[1].wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _launcher_of_launcher() -> int | None:
    """The process above DeepSpeed's per-node launcher (the `deepspeed` command); None under other launchers."""
    parent = Path("/proc") / str(os.getppid())
    try:
        if b"deepspeed.launcher.launch" not in (parent / "cmdline").read_bytes():
            return None
        return int((parent / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------- configuration


def resolve_ds_config(
    path: Path, *, batch: int, batch_flag: str, world_size: int, max_micro_batch: int, gradient_clipping: float
) -> dict[str, Any]:
    """Read a DeepSpeed JSON strictly, and put our numbers where it says "auto".

    Args:
        path: the file.
        batch: global batch, in the unit of the micro-batch (positions, or sequences).
        batch_flag: the flag that set it, for messages.
        world_size: number of ranks.
        max_micro_batch: upper bound of a rank's micro-batch; the largest divisor below it is taken.
        gradient_clipping: norm, 0 = none.

    Raises:
        UserError: not JSON, an unknown or removed key, an "auto" that nobody resolves, numbers that do not fit.
    """
    config = _read_ds_config(path)
    _refuse_keys(path, config)
    if batch % world_size:
        raise UserError(
            f"{batch_flag} {batch:,} cannot be dealt evenly to {world_size} ranks: choose a multiple of "
            f"{world_size}, such as {(batch // world_size + 1) * world_size:,}"
        )
    share = batch // world_size
    micro = config.get(_MICRO_BATCH, _AUTO)
    if micro == _AUTO:
        micro = next(size for size in range(min(share, max_micro_batch), 0, -1) if share % size == 0)
    if not isinstance(micro, int) or micro < 1 or share % micro:
        raise UserError(
            f"{path}: {_MICRO_BATCH} {micro!r} does not divide a rank's {share:,} of {batch_flag} {batch:,} over "
            f'{world_size} ranks: write "auto"'
        )
    derived = {_MICRO_BATCH: micro, _ACCUMULATION: share // micro, "train_batch_size": batch}
    for name, value in derived.items():
        if config.get(name, _AUTO) not in (_AUTO, value):
            raise UserError(
                f"{path}: {name} is {config[name]!r}, but {batch_flag} {batch:,} over {world_size} ranks with "
                f'micro-batches of {micro:,} makes it {value:,}: write "auto" or leave it out'
            )
    if config.get(_CLIPPING, _AUTO) not in (_AUTO, gradient_clipping):
        raise UserError(
            f"{path}: {_CLIPPING} is {config[_CLIPPING]!r}, but --gradient-clipping is {gradient_clipping}: write "
            '"auto", or give the flag the same number'
        )
    resolved = {**config, **derived, _CLIPPING: gradient_clipping}
    for place in _find_auto(resolved):
        raise UserError(
            f'{path}: {place} is "auto", which only Hugging Face\'s Trainer resolves: give a number ("auto" '
            f"is for {', '.join(_OWNED)})"
        )
    _check_sections(path, resolved)
    return resolved


def _read_ds_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--ds-config {path} does not exist: choose one of ds_configs/") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--ds-config {path} is not a JSON file ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"--ds-config {path} must hold a JSON object, not a {type(config).__name__}")
    return config


def _refuse_keys(path: Path, config: Mapping[str, Any]) -> None:
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{path}: zero_optimization must be an object, not {zero!r}")
    for name in config:
        if name in _REFUSED:
            raise UserError(f"{path}: {name!r} is not taken: {_REFUSED[name]}")
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.5)
            raise UserError(
                f"{path}: unknown key {name!r}; "
                f"{f'did you mean {near[0]!r}?' if near else f'known are {sorted(_KNOWN)}'}"
            )
    for name in zero:
        if name in _REFUSED_ZERO:
            raise UserError(f"{path}: 'zero_optimization.{name}' is not taken: {_REFUSED_ZERO[name]}")


def _find_auto(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _find_auto(inner, f"{place}.{name}".lstrip("."))
    elif value == _AUTO:
        yield place


def _check_sections(path: Path, config: Mapping[str, Any]) -> None:
    """Let DeepSpeed check the ZeRO section's keys and values now, before anything is written."""
    import_deepspeed()
    for name, module, model in (
        ("zero_optimization", "deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
        ("bf16", "deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    ):
        section = config.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} must be an object, not {section!r}")
        try:
            getattr(importlib.import_module(module), model)(**section)
        except Exception as error:  # pydantic's own family, which this file would only know by importing pydantic
            lines = [line.strip() for line in str(error).splitlines()]
            raise UserError(
                f"{path}: {name} is not valid: {'; '.join(lines[1:3]) or error}. Mend or remove the key"
            ) from error
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        if not importlib.import_module("deepspeed.ops").__compatible_ops__.get("async_io", False):
            raise UserError(
                f"{path} offloads to NVMe, and DeepSpeed's async_io does not build here: install libaio "
                "(libaio-dev) or use ds_configs/zero3_offload.json"
            )
        if not Path(str(offload.get("nvme_path"))).is_dir():
            raise UserError(
                f"{path}: nvme_path {offload.get('nvme_path')!r} is not a directory: name one on a local NVMe"
            )


def zero_stage(config: Mapping[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of weights and activations: bfloat16 where the file enables bf16, else float32."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled", False) else torch.float32


def micro_batches_per_step(config: Mapping[str, Any]) -> int:
    return int(config["gradient_accumulation_steps"])


# ---------------------------------------------------------------------------------------------- engine


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
    """A model under ZeRO: steps, checkpoints, whole weights. Every method is collective: all ranks call it alike."""

    def __init__(self, engine: Any, config: Mapping[str, Any], world: World) -> None:
        self._engine, self._config, self._world = engine, config, world
        self.stage = zero_stage(config)
        self.dtype = compute_dtype(config)
        self.device: torch.device = torch.device(engine.device)

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
        """One optimizer step over this rank's micro-batches; what each forward returned, detached (loss first)."""
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        outputs = []
        for arguments in micro_batches:
            output = self._engine(*arguments)
            self._engine.backward(output[0])
            self._engine.step()
            outputs.append(tuple(tensor.detach() for tensor in output))
        return outputs

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

    def save(self, root: Path, step: int, *, fields: Mapping[str, Any], values: Mapping[str, Any], keep: int) -> None:
        """Publish the checkpoint of `step` below `root` and remove all but the newest `keep`.

        Args:
            root: OUTPUT/checkpoints.
            step: optimizer steps done.
            fields: the manifest's description of what is trained.
            values: plain values that `resume` gives back, the same on every rank.
            keep: checkpoints kept.
        """
        name = checkpoint_name(step) + ".tmp"
        if self._world.is_first:
            root.mkdir(parents=True, exist_ok=True)
            remove_unfinished(root)
        self.wait()
        self._engine.save_checkpoint(str(root), tag=name, client_state={"mlpmem": {"step": step}}, save_latest=False)
        self.wait()
        names = sorted(str(path.relative_to(root / name)) for path in (root / name).rglob("*") if path.is_file())
        shares = gather_values(
            record_and_flush(root / name, deal(names, self._world.rank, self._world.size)), self._world
        )
        if self._world.is_first:
            described = {
                **fields,
                "world": self._world.size,
                "zero_stage": self.stage,
                "skipped_steps": self.skipped_steps,
                "values": dict(values),
            }
            publish_checkpoint(root, step, described, [record for share in shares for record in share])
            remove_old_checkpoints(root, keep)
        self.wait()

    def resume(self, root: Path) -> SavedState | None:
        """Load the newest checkpoint below `root` whose files match its manifest; None where there is none at all.

        Raises:
            UserError: there are checkpoints and none of them is whole, or the ZeRO stage cannot be changed to this one.
        """
        if self._world.is_first:
            remove_unfinished(root)
        self.wait()
        candidates = list_checkpoints(root)
        for path in candidates:
            fault = self._fault_of(path)
            if fault is None:
                checkpoint = read_checkpoint(path)
                self._load(checkpoint)
                _logger.info("resuming from %s (step %d)", path, checkpoint.step)
                return SavedState(step=checkpoint.step, values=checkpoint.manifest["values"])
            if self._world.is_first:
                _logger.warning("%s: not resuming from %s, it is set aside as *.damaged", fault, path.name)
                set_aside(path)
        damaged = [*root.glob("step-*.damaged")] if root.is_dir() else []
        if candidates or damaged:
            raise UserError(
                f"no checkpoint in {root} is whole ({len(candidates) or len(damaged)} damaged): restore one from "
                f"a copy, or remove {root} to start anew"
            )
        return None

    def _fault_of(self, path: Path) -> str | None:
        faults = gather_values(fault_of_checkpoint(path, rank=self._world.rank, size=self._world.size), self._world)
        return next(filter(None, faults), None)

    def _load(self, checkpoint: Checkpoint) -> None:
        saved_stage, saved_world = checkpoint.manifest["zero_stage"], checkpoint.manifest["world"]
        same_layout = saved_stage == self.stage and (saved_world == self._world.size or self.stage == 0)
        if same_layout:
            path, _ = self._engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
            if path is None:
                raise UserError(f"DeepSpeed found nothing to load in {checkpoint.path}: restore it from a copy")
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
        self._load_other_layout(checkpoint)

    def _load_other_layout(self, checkpoint: Checkpoint) -> None:
        """Through DeepSpeed's universal format: whole float32 weights and moments, a folder a parameter."""
        universal = checkpoint.path.with_name(checkpoint.path.name + ".universal.tmp")
        if self._world.is_first:
            _convert_to_universal(checkpoint.path, universal)
        self.wait()
        skipped = checkpoint.manifest["skipped_steps"]
        self._make_moments(checkpoint.step - skipped)
        for name, parameter in self.module.named_parameters():
            for state in ("fp32", *_MOMENTS):
                loaded = torch.load(universal / "zero" / name / f"{state}.pt", map_location="cpu", weights_only=True)
                tensor = loaded["param"] if isinstance(loaded, dict) else loaded
                self._set_whole(parameter, state, tensor.reshape(-1)[: _numel(parameter)].float())
        self._engine.global_steps, self._engine.skipped_steps = checkpoint.step, skipped
        self.wait()
        if self._world.is_first:
            shutil.rmtree(universal)
            (checkpoint.path.parent / "latest_universal").unlink(missing_ok=True)

    def _make_moments(self, steps: int) -> None:
        """Adam's state, which would only come into being in the first step: zero moments after so many steps."""
        wrapper, optimizer = self._engine.optimizer, self._engine.basic_optimizer
        is_torch = isinstance(optimizer, torch.optim.AdamW)
        flat = next(getattr(wrapper, name) for name in _FLAT_MASTERS if hasattr(wrapper, name))
        for master in flat:
            optimizer.state[master] = {
                "step": torch.tensor(float(steps), device=master.device) if is_torch else steps,
                **{name: torch.zeros_like(master) for name in _MOMENTS},
            }
        if self.stage < 3:
            wrapper._lazy_init_hp_params_optimizer_state()

    def _set_whole(self, parameter: nn.Parameter, state: str, values: torch.Tensor) -> None:
        """Write this rank's part of a parameter's float32 weight or moment; `values` is the whole of it, flat."""
        fragments = importlib.import_module("deepspeed.utils")
        if self.stage == 3:
            local = (
                fragments.safe_get_local_fp32_param(parameter)
                if state == "fp32"
                else fragments.safe_get_local_optimizer_state(parameter, state)
            )
            padded = torch.zeros(local.numel() * self._world.size)
            padded[: len(values)] = values
            mine = padded[local.numel() * self._world.rank :][: local.numel()].to(local.device)
            if state == "fp32":
                fragments.safe_set_local_fp32_param(parameter, mine)
            else:
                fragments.safe_set_local_optimizer_state(parameter, mine, state)
        elif state == "fp32":
            fragments.safe_set_full_fp32_param(parameter, values.to(parameter.device))
        else:
            fragments.safe_set_full_optimizer_state(parameter, values.to(parameter.device), state)
        if state == "fp32":
            set_parameter(parameter, values)

    # -- weights

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The float32 master weights by name, on the CPU of rank 0; an empty dict elsewhere.

        Rank 0 needs 4 bytes a parameter of memory.
        """
        fragments = importlib.import_module("deepspeed.utils")
        weights = {}
        for name, parameter in self.module.named_parameters():
            has_master = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
            whole = fragments.safe_get_full_fp32_param(parameter) if has_master else parameter.detach()
            if self._world.is_first:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                weights[name] = whole.detach().reshape(shape).to("cpu", torch.float32, copy=True)
        return weights

    def wait(self) -> None:
        """Until every rank is here."""
        torch.distributed.barrier()

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
        make_model: each leaf must initialise itself in its own __init__.
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
    with deepspeed.zero.Init(config_dict_or_path=config) if zero_stage(config) == 3 else contextlib.nullcontext():
        model = make_model()
    if prepare is not None:
        prepare(model)
    optimizer = _make_optimizer(model, config, settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return Engine(engine, config, world)


def _make_optimizer(model: nn.Module, config: Mapping[str, Any], settings: AdamWSettings) -> torch.optim.Optimizer:
    """AdamW at learning rate 0 (each step sets it); biases and norms are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if len(_shape(p)) > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if len(_shape(p)) <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    offloads = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
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


def _shape(parameter: nn.Parameter) -> Sequence[int]:
    """The whole parameter's shape, also where ZeRO-3 has cut it."""
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


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
