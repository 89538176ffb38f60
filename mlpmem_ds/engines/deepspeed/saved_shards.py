"""Float32 weights and Adam's moments in the files of a checkpoint, slice by slice.

Part of a resume in another layout than the saved one, and of `convert_checkpoint`. The files are
mapped, so that a rank reads from disk what it takes and no more. Only this file knows how DeepSpeed lays
them out: each rank's flat groups, and where in them a weight's part lies.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from mlpmem_ds.core.errors import DamagedDataError, first_line
from mlpmem_ds.engines.deepspeed.library import import_part
from mlpmem_ds.formats.checkpoint import Checkpoint

Part = Literal["fp32", "exp_avg", "exp_avg_sq"]
PARTS: tuple[Part, ...] = ("fp32", "exp_avg", "exp_avg_sq")
_CLASSES = (
    ("runtime.fp16.loss_scaler", "LossScaler"),
    ("runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("runtime.zero.config", "ZeroStageEnum"),
    ("utils.tensor_fragment", "fragment_address"),
)
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where numbers [start, stop) of a weight lie: in a rank's flat group, from `offset` on."""

    start: int
    stop: int
    rank: int
    group: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class FlatLayout:
    """What has to be the same for a rank's flat groups to be taken over as they are, without names."""

    shapes: Sequence[Sequence[tuple[str, tuple[int, ...]]]]
    """the weights of each group in their order, whole"""
    fragments: Sequence[Mapping[str, tuple[int, int]]]
    """at stages 1 and 2 where each weight's part begins in a group, and how long it is; at stage 3 the shapes
    tell"""
    settings: frozenset[str]
    """names of what the optimizer holds of a group; torch's AdamW and DeepSpeed's differ in them"""


def layout_of(
    shapes: Sequence[Mapping[str, Sequence[int]]],
    fragments: Sequence[Mapping[str, Any]],
    settings: Collection[str],
) -> FlatLayout:
    """That of DeepSpeed's own values."""
    return FlatLayout(
        shapes=[[(name, tuple(shape)) for name, shape in group.items()] for group in shapes],
        fragments=[
            {name: (address.start, address.numel) for name, address in group.items()} for group in fragments
        ],
        settings=frozenset(settings),
    )


def saved_layout(checkpoint: Checkpoint, rank: int) -> FlatLayout:
    """That of a rank in a checkpoint of stages 1 to 3.

    Raises:
        DamagedDataError: the files are not a checkpoint that can be put together.
    """
    try:
        state = load_plain(optimizer_files(checkpoint)[rank])["optimizer_state_dict"]
        fragments = () if _is_of_stage_3(state) else state["param_slice_mappings"]
        return layout_of(_saved_shapes(checkpoint), fragments, _inner_state(state)["param_groups"][0])
    except Exception as error:  # KeyError, IndexError, and pickle's and zip's own
        raise damaged(checkpoint.path, error) from error


class SavedShards:
    """What a checkpoint of stages 1 to 3 and any number of ranks holds of each weight.

    Raises:
        DamagedDataError: the files are not a checkpoint that can be put together.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = checkpoint.path
        try:
            files = optimizer_files(checkpoint)
            self._optimizer_state = lru_cache(maxsize=None)(lambda rank: load_plain(files[rank]))
            groups = _saved_shapes(checkpoint)
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(shape) for group in groups for name, shape in group.items()
            }
            is_stage_3 = bool(files) and _is_of_stage_3(self._optimizer_state(0)["optimizer_state_dict"])
            self._places = (
                _evenly_cut(groups, len(files)) if is_stage_3 else self._fragments(groups, len(files))
            )
        except Exception as error:  # KeyError, IndexError, and pickle's and zip's own
            raise damaged(self._path, error) from error

    def read(self, name: str, part: Part, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Numbers [start, stop) of a weight, or of one of its moments, in the order of the flat weight.

        Returns: float32 [stop - start], a copy.

        Raises:
            DamagedDataError: they are not all there.
        """
        end = _numel(self.shapes[name]) if stop is None else stop
        values, count = torch.empty(end - start), 0
        try:
            for place in self._places[name]:
                first, last = max(start, place.start), min(end, place.stop)
                if first < last:
                    flat = self._flat(place.rank, place.group, part)
                    offset = place.offset + first - place.start
                    values[first - start : last - start] = flat[offset : offset + last - first]
                    count += last - first
        except Exception as error:  # as above
            raise damaged(self._path, error) from error
        if count != len(values):
            raise damaged(self._path, ValueError(f"{name} has {count} of {len(values)} numbers"))
        return values

    def _flat(self, rank: int, group: int, part: Part) -> torch.Tensor:
        """A rank's flat group; mapped."""
        state = self._optimizer_state(rank)["optimizer_state_dict"]
        flat: torch.Tensor
        if part == "fp32":
            masters = "fp32_flat_groups" if _is_of_stage_3(state) else "single_partition_of_fp32_groups"
            flat = state[masters][group]
        else:
            flat = _inner_state(state)["state"][group][part]
        return flat

    def _fragments(self, groups: Sequence[Mapping[str, Any]], num_ranks: int) -> dict[str, list[_Place]]:
        """Of stages 1 and 2: a group's weights lie in a row, which is cut evenly, so that a weight's parts
        follow each other in the order of the ranks.

        Raises:
            ValueError: they lie in another order than DeepSpeed's addresses say.
        """
        places: dict[str, list[_Place]] = {}
        for rank in range(num_ranks):
            mappings = self._optimizer_state(rank)["optimizer_state_dict"]["param_slice_mappings"]
            for group, mapping in enumerate(mappings):
                for name, address in mapping.items():
                    parts = places.setdefault(name, [])
                    start = parts[-1].stop if parts else 0
                    parts.append(
                        _Place(
                            start=start,
                            stop=start + address.numel,
                            rank=rank,
                            group=group,
                            offset=address.start,
                        )
                    )
        for number, shapes in enumerate(groups):
            order = [name for name, parts in places.items() if parts[0].group == number]
            if order != [name for name in shapes if name in places]:
                raise ValueError("it was saved with round_robin_gradients, which mixes up the weights")
        return places


def optimizer_files(checkpoint: Checkpoint) -> list[Path]:
    """In the order of the ranks; none at stage 0."""
    return sorted((file for file in checkpoint.files if file.name.endswith("_optim_states.pt")), key=_rank_of)


def model_file(checkpoint: Checkpoint) -> Path:
    """That of one rank: every rank's has the whole weights' shapes, and at stage 0 the weights."""
    return min(file for file in checkpoint.files if file.name.endswith("_model_states.pt"))


def _saved_shapes(checkpoint: Checkpoint) -> Sequence[Mapping[str, Any]]:
    """The whole weights' shapes, group by group."""
    shapes: Sequence[Mapping[str, Any]] = load_plain(model_file(checkpoint))["param_shapes"]
    return shapes


def _is_of_stage_3(state: Mapping[str, Any]) -> bool:
    return "fp32_flat_groups" in state


def _inner_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the optimizer that DeepSpeed's own holds."""
    inner: Mapping[str, Any] = state[
        "optimizer_state_dict" if _is_of_stage_3(state) else "base_optimizer_state"
    ]
    return inner


def _evenly_cut(groups: Sequence[Mapping[str, Any]], num_ranks: int) -> dict[str, list[_Place]]:
    """Of stage 3: each weight is cut evenly, and a rank's parts of a group lie in a row."""
    places: dict[str, list[_Place]] = {}
    for group, shapes in enumerate(groups):
        offset = 0
        for name, shape in shapes.items():
            numel = _numel(shape)
            share = -(-numel // num_ranks)
            places[name] = [
                _Place(
                    start=rank * share,
                    stop=min((rank + 1) * share, numel),
                    rank=rank,
                    group=group,
                    offset=offset,
                )
                for rank in range(num_ranks)
                if rank * share < numel
            ]
            offset += share
    return places


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _rank_of(file: Path) -> int:
    match = _RANK.search(file.name)
    assert match is not None, file
    return int(match[1])


def load_plain(file: Path) -> Any:
    """What a checkpoint's file holds, tensors mapped: plain values and the few classes of DeepSpeed that its
    checkpoints name. Nothing else is unpickled, so that no code of whoever wrote the file runs.

    Raises of any kind.
    """
    classes = [getattr(import_part(module), name) for module, name in _CLASSES]
    with torch.serialization.safe_globals(classes):
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def refuse_foreign_code(files: Sequence[Path]) -> str | None:
    """What is wrong with the first of these files that cannot be read as `load_plain` does; None: nothing."""
    for file in files:
        try:
            load_plain(file)
        except Exception as error:  # pickle's, zip's and torch's own
            return str(damaged(file, error))
    return None


def damaged(path: Path, error: Exception) -> DamagedDataError:
    """That a checkpoint cannot be put together, and what to do."""
    reason = first_line(error)
    return DamagedDataError(
        f"{path} cannot be put together ({type(error).__name__}: {reason}): choose another checkpoint"
        " (convert_checkpoint --step), or restore it from a copy"
    )
