"""DeepSpeed's JSON file, read strictly: unknown and removed keys are refused, our numbers put where it says
"auto".

Part of `train` and `train_base`: before anything is written. DeepSpeed itself accepts unknown keys and a left
"auto" in silence; what only DeepSpeed can judge, the values of its sections, is checked by its own classes.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.deepspeed.library import import_deepspeed, import_part

_AUTO = "auto"
_MICRO_BATCH, _ACCUMULATION = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
_CLIPPING = "gradient_clipping"
_MANAGED = "managed_gradient_accumulation"
_DTYPES = ("fp32", "bf16", "fp16")  # as DeepSpeed names them
_OWNED = (_MICRO_BATCH, _ACCUMULATION, _CLIPPING)
_KNOWN = frozenset(
    {
        *_OWNED,
        "train_batch_size",
        _MANAGED,
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
    "elasticity": ("remove it: the batch is the same at any number of GPUs, and a rerun resumes on another"),
    "nebula": "remove it: checkpoints are published by this program",
    "amp": "remove it and use bf16",
    "compression_training": "remove it: DeepSpeed's compression is gone",
    "quantize_training": "remove it: DeepSpeed's quantized training is gone",
    "sparse_gradients": "remove it: gradients here are dense",
    "sparse_attention": "remove it: the memory has no attention",
    "eigenvalue": "remove it: DeepSpeed no longer has it",
    "graph_harvesting": "remove it: DeepSpeed no longer has it",
    "curriculum_learning": "remove it: DeepSpeed no longer has it",
    "data_efficiency": "remove it: the order of the data is set by flags, such as --seed",
    "progressive_layer_drop": "remove it: DeepSpeed no longer has it",
    "tensorboard": "remove it: OUTPUT/tensorboard is written by this program",
    "csv_monitor": "remove it: OUTPUT/metrics.jsonl is written by this program",
    "wandb": "remove it: OUTPUT/metrics.jsonl and OUTPUT/tensorboard are written by this program",
    "autotuning": "remove it: the largest micro-batch is set by a flag",
}
_REFUSED_ZERO = {
    "mics_shard_size": (
        "remove it: DeepSpeed no longer has MiCS; zero_hpz_partition_size keeps shards inside a node"
    ),
    "mics_hierarchical_params_gather": "remove it: DeepSpeed no longer has MiCS",
    "zeropp_loco_param": "remove it: DeepSpeed no longer has it",
    "elastic_checkpoint": "remove it: another world size resumes by itself",
}


def resolve_ds_config(
    path: Path,
    *,
    batch: int,
    batch_flag: str,
    world_size: int,
    max_micro_batch: int,
    gradient_clipping: float | None,
) -> dict[str, Any]:
    """Read a DeepSpeed JSON strictly, put our numbers where it says "auto", and let DeepSpeed check the rest.

    What DeepSpeed reads from its sections replaces what they say: see `_checked_sections`.

    Args:
        path: the file.
        batch: global batch, in the unit of the micro-batch (positions, or sequences).
        batch_flag: the flag that set it, for messages.
        world_size: number of ranks.
        max_micro_batch: upper bound of a rank's micro-batch; the largest divisor below it is taken.
        gradient_clipping: norm, None = never clipped.

    Raises:
        UserError: not JSON, an unknown or removed key, an "auto" without a meaning here, numbers or values
            that do not fit, or an offload to NVMe that cannot work here.
    """
    config = _read_ds_config(path)
    _refuse_keys(path, config)
    sizes = _batch_sizes(
        path,
        config,
        batch=batch,
        batch_flag=batch_flag,
        world_size=world_size,
        max_micro_batch=max_micro_batch,
    )
    clipping = gradient_clipping or 0.0  # DeepSpeed's own default is 1
    if config.get(_CLIPPING, _AUTO) not in (_AUTO, clipping):
        raise UserError(
            f"{path}: {_CLIPPING} is {config[_CLIPPING]!r}, but --gradient-clipping is {gradient_clipping}:"
            ' write "auto", or give the flag the same number'
        )
    resolved = {**config, **sizes, _CLIPPING: clipping}
    for place in _find_auto(resolved):
        raise UserError(
            f'{path}: {place} is "auto", which only Hugging Face\'s Trainer resolves: give a number ("auto" '
            f"is for {', '.join(_OWNED)})"
        )
    import_deepspeed()
    resolved |= _checked_sections(path, resolved)
    _refuse_round_robin(path, resolved, world_size)
    _refuse_rounded_weights(path, resolved)
    _check_sums(path, resolved)
    _check_places(path, resolved, world_size)
    return resolved


def _batch_sizes(
    path: Path,
    config: Mapping[str, Any],
    *,
    batch: int,
    batch_flag: str,
    world_size: int,
    max_micro_batch: int,
) -> dict[str, int]:
    """DeepSpeed's three names of how a batch is cut."""
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
            f"{path}: {_MICRO_BATCH} {micro!r} does not divide a rank's {share:,} of {batch_flag} {batch:,}"
            f' over {world_size} ranks: write "auto"'
        )
    derived = {_MICRO_BATCH: micro, _ACCUMULATION: share // micro, "train_batch_size": batch}
    for name, value in derived.items():
        if config.get(name, _AUTO) not in (_AUTO, value):
            raise UserError(
                f"{path}: {name} is {config[name]!r}, but {batch_flag} {batch:,} over {world_size} ranks"
                f' with micro-batches of {micro:,} makes it {value:,}: write "auto" or leave it out'
            )
    return derived


def _read_ds_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"--ds-config {path} does not exist: choose one of ds_configs/") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--ds-config {path} cannot be read ({reason}): choose one of ds_configs/") from error
    except (ValueError, RecursionError) as error:  # also an integer of too many digits, or too deep
        raise UserError(
            f"--ds-config {path} is not a JSON file ({error}): mend it, or choose one of ds_configs/"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"--ds-config {path} must hold a JSON object, not a {type(config).__name__}")
    return config


def _refuse_keys(path: Path, config: Mapping[str, Any]) -> None:
    zero, checkpoint = (config.get(name, {}) for name in ("zero_optimization", "checkpoint"))
    for name, section in (("zero_optimization", zero), ("checkpoint", checkpoint)):
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} must be an object, not {section!r}")
    for name in config:
        if name in _REFUSED:
            raise UserError(f"{path}: {name!r} is not taken: {_REFUSED[name]}")
        if name not in _KNOWN:
            similar = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.5)
            raise UserError(
                f"{path}: unknown key {name!r}; "
                f"{f'did you mean {similar[0]!r}?' if similar else f'known are {sorted(_KNOWN)}'}"
            )
    for name in zero:
        if name in _REFUSED_ZERO:
            raise UserError(f"{path}: 'zero_optimization.{name}' is not taken: {_REFUSED_ZERO[name]}")
    if not config.get(_MANAGED, True):
        raise UserError(
            f"{path}: {_MANAGED} is {config[_MANAGED]!r}, and DeepSpeed then steps after each micro-batch:"
            " remove it: the trainer decides where a step ends"
        )
    if checkpoint.get("load_universal", False):
        raise UserError(
            f"{path}: checkpoint.load_universal is {checkpoint['load_universal']!r}: remove it: checkpoints"
            " of another stage or number of ranks are resumed by themselves"
        )


def _find_auto(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _find_auto(inner, f"{place}.{name}".lstrip("."))
    elif value == _AUTO:
        yield place


def _checked_sections(path: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections as DeepSpeed takes them, checked by its own classes before anything is written.

    It takes "8" for 8, "false" for False, `cpu_offload` for a section of its own and null for a key that is
    left out. Who reads the resolved configuration gets what it makes of them, and no other idea of them.
    """
    checked = {}
    for name, module, model in (
        ("zero_optimization", "runtime.zero.config", "DeepSpeedZeroConfig"),
        ("bf16", "runtime.precision_config", "DeepSpeedBF16Config"),
    ):
        if name not in config:
            continue
        section = config[name]
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} must be an object, not {section!r}")
        try:
            values = getattr(import_part(module), model)(**section)
        except Exception as error:  # pydantic's own family, which is known only where pydantic is imported
            lines = [line.strip() for line in str(error).split("\n")]
            raise UserError(
                f"{path}: {name} is not valid: {'; '.join(lines[1:3]) or error}. Mend or remove the key"
            ) from error
        checked[name] = values.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    return checked


def _refuse_round_robin(path: Path, config: Mapping[str, Any], world_size: int) -> None:
    """With it DeepSpeed 0.19.8 reorders the weights in its flat groups, and looks for their float32 values in
    the former order: the written weights would be parts of each other's. Stage 3, and one rank, have no such
    groups."""
    zero = config.get("zero_optimization", {})
    if world_size > 1 and zero.get("stage", 0) in (1, 2) and zero.get("round_robin_gradients", False):
        raise UserError(
            f"{path}: zero_optimization.round_robin_gradients is true, and DeepSpeed then mixes up the"
            " weights that are written: set it to false, or remove it"
        )


def _refuse_rounded_weights(path: Path, config: Mapping[str, Any]) -> None:
    """DeepSpeed's optimizer of bf16 at stage 0 does not give out its float32 weights: rounded ones would be
    written."""
    if compute_dtype(config) == torch.bfloat16 and zero_stage(config) == 0:
        raise UserError(
            f"{path}: bf16 is enabled at ZeRO stage 0, where DeepSpeed gives no float32 weights to write:"
            " give zero_optimization.stage 1 or more, or set bf16.enabled to false (with --resume"
            " never, where a training was begun so)"
        )


def _check_sums(path: Path, config: Mapping[str, Any]) -> None:
    """The dtypes in which gradients are added up and sent: DeepSpeed judges them only when its engine is
    made, after OUTPUT was begun. At stage 0 it adds them up in the dtype of the weights alone."""
    data_types = config.get("data_types", {})
    if not isinstance(data_types, dict):
        raise UserError(f"{path}: data_types must be an object, not {data_types!r}")
    sums, sent = data_types.get("grad_accum_dtype"), config.get("communication_data_type")
    sums_dtype = _dtype_of(path, "data_types.grad_accum_dtype", sums)
    if sent is not None and str(sent).lower() not in _DTYPES:
        raise _not_a_dtype(path, "communication_data_type", sent)
    if zero_stage(config) == 0 and sums_dtype not in (None, torch.float32):
        raise UserError(
            f"{path}: data_types.grad_accum_dtype is {sums!r} at ZeRO stage 0, where DeepSpeed sums in the"
            " dtype of the weights, fp32: remove it, or give zero_optimization.stage 1 or more"
        )


def _dtype_of(path: Path, place: str, name: Any) -> torch.dtype | None:
    """By DeepSpeed's names: "fp32", "float32" and more."""
    if name is None:
        return None
    try:
        dtype = import_part("runtime.config").DtypeEnum(name).value
    except ValueError as error:
        raise _not_a_dtype(path, place, name) from error
    assert isinstance(dtype, torch.dtype)
    if not dtype.is_floating_point:  # DeepSpeed takes int8: gradients below 1 are 0 in it
        raise _not_a_dtype(path, place, name)
    return dtype


def _not_a_dtype(path: Path, place: str, name: Any) -> UserError:
    return UserError(f"{path}: {place} is {name!r}: give one of {', '.join(_DTYPES)}, or remove it")


def _check_places(path: Path, config: Mapping[str, Any], world_size: int) -> None:
    """Shards inside a node need whole nodes, and an offload to NVMe what it is made with; a world that is
    smaller than a node is one of its own."""
    zero = config.get("zero_optimization", {})
    size = zero.get("zero_hpz_partition_size", 1)  # 0 and 1: none
    if 1 < size < world_size and world_size % size:
        raise UserError(
            f"{path}: zero_hpz_partition_size {size} does not divide the {world_size} ranks: give it the"
            " number of GPUs of a node, or use ds_configs/zero3.json"
        )
    offload = zero.get("offload_optimizer", {})
    if offload.get("device") == "nvme":
        _check_nvme(path, offload)


def _check_nvme(path: Path, offload: Mapping[str, Any]) -> None:
    if not import_part("ops").__compatible_ops__.get("async_io", False):
        raise UserError(
            f"{path} offloads to NVMe, and DeepSpeed's async_io does not build here: install libaio "
            "(libaio-dev) or use ds_configs/zero3_offload.json"
        )
    if not Path(str(offload.get("nvme_path"))).is_dir():
        raise UserError(
            f"{path}: nvme_path {offload.get('nvme_path')!r} is not a directory: name one on a local NVMe"
        )


def zero_stage(config: Mapping[str, Any]) -> int:
    """0 to 3, of a resolved configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of weights and activations: bfloat16 where a resolved configuration enables bf16, else
    float32."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled", False) else torch.float32


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether a resolved configuration keeps the optimizer's state outside the GPU, in memory or on NVMe."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    return bool(offload.get("device", "none") != "none")


def micro_batches_per_step(config: Mapping[str, Any]) -> int:
    """Of each rank, in a resolved configuration."""
    return int(config["gradient_accumulation_steps"])
