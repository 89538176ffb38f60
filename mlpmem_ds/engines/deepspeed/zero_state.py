"""Whole weights and Adam's moments, out of and into the shards of DeepSpeed's ZeRO optimizers.

Only this file depends on the names that they have inside the library. All functions are collective.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.library import import_deepspeed, import_part, silenced
from mlpmem_ds.engines.processes import wait_for_all
from mlpmem_ds.formats.checkpoint import Checkpoint

# The lists of this rank's flat float32 weights in DeepSpeed's ZeRO-3, ZeRO-1/2 and bf16 ZeRO-1 optimizers.
_FLAT_MASTERS = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
)
_MOMENTS = ("exp_avg", "exp_avg_sq")


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


def whole_weights(state: ZeroState) -> dict[str, torch.Tensor]:
    """The float32 master weights by name, on the CPU of rank 0; an empty dict elsewhere."""
    weights, fragments = {}, import_part("utils")
    for name, parameter in state.module.named_parameters():
        has_master = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        whole = fragments.safe_get_full_fp32_param(parameter) if has_master else parameter.detach()
        if state.world.is_first:
            weights[name] = whole.detach().reshape(whole_shape(parameter)).to("cpu", torch.float32, copy=True)
    return weights


def set_parameter(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Give a parameter these values, whole or cut in shards; called by every rank with the same values."""
    deepspeed = import_deepspeed()
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(values.reshape(parameter.shape))


def load_other_layout(checkpoint: Checkpoint, state: ZeroState, *, steps_applied: int) -> None:
    """Load a checkpoint of another world size or ZeRO stage.

    It goes through DeepSpeed's universal format: whole float32 weights and moments, a folder a parameter.

    Args:
        checkpoint: of stages 1 to 3.
        state: what is loaded into, of stages 1 to 3.
        steps_applied: optimizer steps done, less those that were skipped.
    """
    universal = checkpoint.path.with_name(checkpoint.path.name + ".universal.tmp")
    if state.world.is_first:
        _convert_to_universal(checkpoint.path, universal)
    wait_for_all(state.world)
    _make_moments(state, steps_applied)
    for name, parameter in state.module.named_parameters():
        for part in ("fp32", *_MOMENTS):
            loaded = torch.load(
                universal / "zero" / name / f"{part}.pt", map_location="cpu", weights_only=True
            )
            tensor = loaded["param"] if isinstance(loaded, dict) else loaded
            values = tensor.reshape(-1)[: whole_size(parameter)].float()
            _set_whole(state, parameter, part, values)
            if part == "fp32":
                set_parameter(parameter, values)
    wait_for_all(state.world)
    if state.world.is_first:
        shutil.rmtree(universal)
        (checkpoint.path.parent / "latest_universal").unlink(missing_ok=True)


def _convert_to_universal(source: Path, target: Path) -> None:
    """DeepSpeed's converter, without its prints; one process."""
    shutil.rmtree(target, ignore_errors=True)
    converter = import_part("checkpoint.ds_to_universal")
    with silenced(), contextlib.redirect_stderr(io.StringIO()):
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


def _make_moments(state: ZeroState, steps: int) -> None:
    """Adam's state, which the first step would make: zero moments after so many steps."""
    is_torch = isinstance(state.optimizer, torch.optim.AdamW)
    flat = next(getattr(state.wrapper, name) for name in _FLAT_MASTERS if hasattr(state.wrapper, name))
    for master in flat:
        state.optimizer.state[master] = {
            "step": torch.tensor(float(steps), device=master.device) if is_torch else steps,
            **{name: torch.zeros_like(master) for name in _MOMENTS},
        }
    if state.stage < 3:
        state.wrapper._lazy_init_hp_params_optimizer_state()


def _set_whole(state: ZeroState, parameter: nn.Parameter, part: str, values: torch.Tensor) -> None:
    """Write this rank's share of a parameter's float32 weight or moment; `values` is all of it, flat."""
    fragments = import_part("utils")
    if state.stage < 3:
        if part == "fp32":
            fragments.safe_set_full_fp32_param(parameter, values.to(parameter.device))
        else:
            fragments.safe_set_full_optimizer_state(parameter, values.to(parameter.device), part)
        return
    local = (
        fragments.safe_get_local_fp32_param(parameter)
        if part == "fp32"
        else fragments.safe_get_local_optimizer_state(parameter, part)
    )
    padded = torch.zeros(local.numel() * state.world.size)
    padded[: len(values)] = values
    mine = padded[local.numel() * state.world.rank :][: local.numel()].to(local.device)
    if part == "fp32":
        fragments.safe_set_local_fp32_param(parameter, mine)
    else:
        fragments.safe_set_local_optimizer_state(parameter, mine, part)
