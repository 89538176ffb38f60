"""Whole weights and Adam's moments, out of and into the shards of DeepSpeed's ZeRO optimizers.

Only this file depends on the names that they have inside the library. All functions are collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.library import import_deepspeed, import_part
from mlpmem_ds.engines.deepspeed.saved_shards import (
    PARTS,
    Part,
    SavedShards,
    layout_of,
    saved_layout,
)
from mlpmem_ds.engines.processes import gather_values, sum_over_ranks, wait_for_all
from mlpmem_ds.formats.checkpoint import Checkpoint
from mlpmem_ds.formats.weight_shards import Weight, plan_shards, publish_index, shard_names, write_safetensors

# The lists of this rank's flat float32 weights in DeepSpeed's ZeRO-3, ZeRO-1/2 and bf16 ZeRO-1 optimizers.
_FLAT_MASTERS = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
)


@dataclass(frozen=True, kw_only=True)
class ZeroState:
    """A model under ZeRO, in parts."""

    module: nn.Module
    wrapper: Any
    """DeepSpeed's optimizer"""
    optimizer: torch.optim.Optimizer
    """the one inside it"""
    stage: int
    world: World


def whole_shape(parameter: nn.Parameter) -> Sequence[int]:
    """The whole parameter's shape, also where ZeRO-3 has cut it."""
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def whole_size(parameter: nn.Parameter) -> int:
    """Numbers in the whole parameter, also where ZeRO-3 has cut it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def write_whole_weights(
    state: ZeroState, root: Path, stem: str, *, max_bytes: int, with_frozen: bool = True
) -> None:
    """Write the float32 master weights to `root`/`stem`.safetensors, or in several files with an index.

    The ranks take turns at the files, and a file is written while the next one's weights are gathered: a rank
    holds one file's weights at most. No rank is in a collective while another writes.

    Args:
        state: any stage.
        root: an existing directory.
        stem: of the files' names.
        max_bytes: of a file.
        with_frozen: whether weights without a gradient are written too.

    Raises:
        OSError: a file could not be written, on the rank that wrote it.
    """
    parameters = {
        name: parameter
        for name, parameter in sorted(state.module.named_parameters())
        if parameter.requires_grad or with_frozen
    }
    sizes = {name: 4 * whole_size(parameter) for name, parameter in parameters.items()}
    shards = plan_shards(sizes, max_bytes)
    names = shard_names(stem, len(shards))
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for number, (file, members) in enumerate(zip(names, shards, strict=True)):
            is_mine = number % state.world.size == state.world.rank
            if is_mine and written is not None:
                written.result()
            wait_for_all(state.world)
            weights = {}
            for name in members:
                whole_N = _gather_master(parameters[name])
                if is_mine:
                    weights[name] = whole_N.to("cpu", torch.float32, copy=True)
            if is_mine:
                written = writer.submit(_publish_weights, root / file, weights)
        if written is not None:
            written.result()
    wait_for_all(state.world)
    if state.world.is_first:
        publish_index(root, stem, dict(zip(names, shards, strict=True)), sum(sizes.values()))
    wait_for_all(state.world)


def _gather_master(parameter: nn.Parameter) -> torch.Tensor:
    """The whole float32 parameter, of its own shape, on every rank; collective."""
    if not parameter.requires_grad:  # the optimizer has no float32 copy of it
        with import_deepspeed().zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    has_master = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
    whole = import_part("utils").safe_get_full_fp32_param(parameter) if has_master else parameter
    gathered: torch.Tensor = whole.detach().reshape(whole_shape(parameter))
    return gathered


def _publish_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    with publish(path) as temporary:
        write_safetensors(
            temporary,
            {
                name: Weight(shape=tuple(tensor.shape), dtype=tensor.dtype, read=partial(_same, tensor))
                for name, tensor in weights.items()
            },
        )


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def set_parameter(parameter: nn.Parameter, read: Callable[[], torch.Tensor], world: World) -> None:
    """Give a parameter the values that rank 0 reads, before the engine is made; collective.

    At stage 3 the ranks get their shards here, at the others the whole parameter when the engine is made.
    """
    deepspeed = import_deepspeed()
    values = read() if world.is_first else None
    wait_for_all(world)
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        if values is not None:
            parameter.copy_(values.reshape(parameter.shape))


def has_same_layout(
    checkpoint: Checkpoint, state: ZeroState, shapes: Sequence[Mapping[str, Sequence[int]]]
) -> bool:
    """Whether every rank's flat groups are laid out as in a checkpoint, so that DeepSpeed, which copies them
    without names, can load it; collective.

    Not at any two settings of one stage: `sub_group_size` cuts the groups of stage 3, `parameter_alignment`
    moves the weights of stage 2, and an offloaded optimizer is another one.

    Args:
        checkpoint: of the same stage, 1 to 3.
        state: what is loaded into.
        shapes: of the whole weights, group by group, in the order in which DeepSpeed holds them.

    Raises:
        DamagedDataError: the files are not a checkpoint that can be put together.
    """
    if checkpoint.manifest.world != state.world.size:
        return False
    fragments = state.wrapper._param_slice_mappings if state.stage < 3 else ()
    own = layout_of(shapes, fragments, state.optimizer.param_groups[0])
    return all(gather_values(saved_layout(checkpoint, state.world.rank) == own, state.world))


def load_other_layout(checkpoint: Checkpoint, state: ZeroState, *, steps_applied: int) -> None:
    """Load a checkpoint of another world size, ZeRO stage or layout of the flat groups, by names.

    Each rank reads its own slice of each weight and moment out of the files, 12 bytes a parameter over all
    ranks together, and waits for the others only when it has read.

    Args:
        checkpoint: of stages 1 to 3.
        state: what is loaded into, of stages 1 to 3.
        steps_applied: optimizer steps done, less those that were skipped.

    Raises:
        DamagedDataError: the files do not hold these weights.
    """
    parameters = {name: weight for name, weight in state.module.named_parameters() if weight.requires_grad}
    shards = SavedShards(checkpoint)
    if {name: tuple(whole_shape(parameter)) for name, parameter in parameters.items()} != shards.shapes:
        raise DamagedDataError(f"{checkpoint.path} holds other weights than the model has: remove it")
    _make_moments(state, steps_applied)
    if state.stage == 3:
        state.wrapper.checkpoint_event_prologue()  # no weight is whole while its shards change
    for name, parameter in parameters.items():
        start, stop = _own_range(state, parameter)
        for part in PARTS:
            _set_own(state, parameter, part, shards.read(name, part, start, stop))
    wait_for_all(state.world)
    if state.stage == 3:
        state.wrapper.checkpoint_event_epilogue()  # gathers those that stay whole
    else:
        for parameter in parameters.values():
            _gather_from_masters(state, parameter)


def _own_range(state: ZeroState, parameter: nn.Parameter) -> tuple[int, int]:
    """The numbers [start, stop) of the flat parameter that this rank's optimizer holds."""
    if state.stage == 3:
        share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        return (
            min(state.world.rank * share, whole_size(parameter)),
            min((state.world.rank + 1) * share, whole_size(parameter)),
        )
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return 0, 0
    address = mapping.lp_fragment_address
    return address.start, address.start + address.numel


def _gather_from_masters(state: ZeroState, parameter: nn.Parameter) -> None:
    """Make a parameter of stages 1 and 2 what the ranks' float32 parts of it say; collective."""
    whole, mapping = torch.zeros_like(parameter.detach()).reshape(-1), parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        start, stop = _own_range(state, parameter)
        whole[start:stop] = mapping.get_hp_fragment()
    sum_over_ranks(whole, state.world)  # each number is of one rank: nothing is rounded
    parameter.data.copy_(whole.reshape(parameter.shape))


def _make_moments(state: ZeroState, steps: int) -> None:
    """Adam's state, which the first step would make: zero moments after so many steps."""
    is_torch = isinstance(state.optimizer, torch.optim.AdamW)
    flat = next(getattr(state.wrapper, name) for name in _FLAT_MASTERS if hasattr(state.wrapper, name))
    for master in flat:
        state.optimizer.state[master] = {
            "step": torch.tensor(float(steps), device=master.device) if is_torch else steps,
            **{name: torch.zeros_like(master) for name in PARTS[1:]},
        }
    if state.stage < 3:
        link_moments(state.wrapper)


def link_moments(wrapper: Any) -> None:
    """Let the parameters of stages 1 and 2 find their parts of the moments.

    DeepSpeed does it once, after the first parameter group's first step: those of the second group are not
    there by then.
    """
    wrapper._hp_optimizer_states_linked = False
    wrapper._lazy_init_hp_params_optimizer_state()


def _set_own(state: ZeroState, parameter: nn.Parameter, part: Part, values: torch.Tensor) -> None:
    """Write this rank's slice of a parameter's float32 weight or moment."""
    if state.stage < 3:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            mapping.get_hp_fragment(None if part == "fp32" else part).data.copy_(values)
        return
    fragments = import_part("utils")
    shard = parameter.ds_tensor  # type: ignore[attr-defined]
    mine = torch.zeros(shard.numel())  # the last rank's ends with zeros
    mine[: len(values)] = values
    if part == "fp32":
        fragments.safe_set_local_fp32_param(parameter, mine)
        shard.data.copy_(mine)
    else:
        fragments.safe_set_local_optimizer_state(parameter, mine, part)
