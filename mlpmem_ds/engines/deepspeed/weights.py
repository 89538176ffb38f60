"""Whole float32 weights out of a checkpoint's files, without a process group, an engine or a GPU.

Part of `convert_checkpoint`, for a training that has not finished.
"""

from __future__ import annotations

from functools import partial

import torch

from mlpmem_ds.engines.deepspeed.library import import_deepspeed
from mlpmem_ds.engines.deepspeed.saved_shards import (
    SavedShards,
    damaged,
    load_plain,
    model_file,
    optimizer_files,
)
from mlpmem_ds.formats.checkpoint import Checkpoint
from mlpmem_ds.formats.weight_shards import Weight


def weights_of_checkpoint(checkpoint: Checkpoint) -> dict[str, Weight]:
    """The float32 weights of a checkpoint, by name; each is read when it is asked for.

    The checkpoint may be of any ZeRO stage and world size.

    Raises:
        DamagedDataError: they are not a checkpoint that can be put together.
    """
    import_deepspeed()  # whose classes the files name
    if not optimizer_files(checkpoint):
        return _whole_weights(checkpoint)
    shards = SavedShards(checkpoint)
    return {
        name: Weight(shape=shape, dtype=torch.float32, read=partial(_read, shards, name))
        for name, shape in shards.shapes.items()
    }


def _read(shards: SavedShards, name: str) -> torch.Tensor:
    return shards.read(name, "fp32").reshape(shards.shapes[name])


def _whole_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Of stage 0, which cuts nothing: every rank's file holds the whole model."""
    try:
        tensors = load_plain(model_file(checkpoint))["module"]
    except Exception as error:  # ValueError, KeyError, and pickle's and zip's own
        raise damaged(checkpoint.path, error) from error
    return {
        name: Weight(
            shape=tuple(tensor.shape), dtype=torch.float32, read=partial(tensor.to, torch.float32, copy=True)
        )
        for name, tensor in tensors.items()
    }
