"""Whole float32 weights out of a checkpoint's files, without a process group, an engine or a GPU.

Part of `convert_checkpoint`, for a training that has not finished. DeepSpeed's own converter reads them.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.engines.deepspeed.library import import_deepspeed, import_part, silenced
from mlpmem_ds.formats.weight_shards import Weight


def weights_of_checkpoint(path: Path) -> dict[str, Weight]:
    """The float32 weights of a checkpoint, by name; each is read when it is asked for.

    The checkpoint may be of any ZeRO stage and world size.

    The files are unpickled, which runs any code in them. Under ZeRO-1 and 2 all float32 weights are
    merged in memory.

    Raises:
        DamagedDataError: they are not a checkpoint that DeepSpeed can put together.
    """
    import_deepspeed()
    converter = import_part("utils.zero_to_fp32")
    try:
        with silenced(), contextlib.redirect_stderr(io.StringIO()):
            if _is_of_bf16_optimizer(path):
                tensors = _joined_fragments(path, converter.get_model_state_files(str(path))[0])
            elif list(path.glob("*_optim_states.pt")):
                tensors = converter.get_fp32_state_dict_from_zero_checkpoint(
                    str(path.parent), path.name, lazy_mode=True
                )
            else:  # stage 0 shards nothing, and the model is whole
                file = converter.get_model_state_files(str(path))[0]
                tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
    except Exception as error:  # KeyError, ValueError, FileNotFoundError, and pickle's and zip's own
        raise DamagedDataError(
            f"{path} cannot be put together ({type(error).__name__}: {error}): choose another --step, or"
            " restore it from a copy"
        ) from error
    return {name: _weight(tensor) for name, tensor in tensors.items()}


def _is_of_bf16_optimizer(path: Path) -> bool:
    """Whether DeepSpeed's optimizer for bfloat16 at stage 1 wrote it, which its converter does not know."""
    files = list(path.glob("*_optim_states.pt"))
    return bool(files) and "zero_stage" not in _optimizer_state(files[0])


def _optimizer_state(file: Path) -> Any:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]


def _joined_fragments(path: Path, model_file: str) -> dict[str, torch.Tensor]:
    """Weights joined from the ranks' flat groups, where a weight's parts follow each other in rank order."""
    shapes: dict[str, Any] = {}
    for group in torch.load(model_file, map_location="cpu", mmap=True, weights_only=False)["param_shapes"]:
        shapes |= group
    files = sorted(
        path.glob("*_optim_states.pt"),
        key=lambda file: int(file.name.split("zero_pp_rank_")[1].split("_")[0]),
    )
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    for state in map(_optimizer_state, files):
        for flat, places in zip(
            state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True
        ):
            for name, place in places.items():
                parts[name].append(flat[place.start : place.start + place.numel])
    return {name: torch.cat(parts[name]).reshape(shapes[name]) for name in shapes}


def _weight(tensor: Any) -> Weight:
    """Of a tensor, or of DeepSpeed's stand-in for one whose parts lie in several files."""
    return Weight(
        shape=tuple(tensor.shape), dtype=torch.float32, read=lambda: tensor.contiguous().to(torch.float32)
    )
