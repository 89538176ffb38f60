"""Part of `convert_checkpoint`: the memory of an unfinished training, or of one step, from a checkpoint.

DeepSpeed's files are pickled; of what they name, only tensors, plain values and its own classes are loaded.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import require_free_bytes, sha256_of_file
from mlpmem_ds.core.manifest import format_of
from mlpmem_ds.core.objects.contents import CHECKPOINTS
from mlpmem_ds.core.run_description import IDENTITY_FIELD
from mlpmem_ds.core.temporaries import remove_stale_temporaries_of, temporary_path
from mlpmem_ds.core.typed_json import from_json
from mlpmem_ds.engines.deepspeed.weights import weights_of_checkpoint
from mlpmem_ds.formats.checkpoint import (
    Checkpoint,
    CheckpointManifest,
    checkpoint_name,
    fault_of_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from mlpmem_ds.formats.trained_models import MemoryManifest, MemorySubject, TrainedMemory
from mlpmem_ds.formats.weight_shards import write_safetensors
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig

_logger = logging.getLogger(__name__)


def find_checkpoint(root: Path, step: int | None, *, flag: str = "--checkpoint") -> Checkpoint:
    """The checkpoint of `step` below a training's output, or the newest one that is whole; every checksum is
    verified.

    Raises:
        UserError: no training of a memory, no such step, or no checkpoint.
        DamagedDataError: none of them is whole.
    """
    if format_of(root) == CheckpointManifest.FORMAT:
        raise UserError(
            f"{flag} {root} is one checkpoint: give the training's output directory, and --step to choose one"
        )
    if format_of(root) != MemoryManifest.FORMAT:
        raise UserError(f"{flag} {root} is no output directory of launch/train.py: give one")
    found = list_checkpoints(root / CHECKPOINTS)
    if not found and (root / "manifest.json").is_file():
        raise UserError(
            f"{flag} {root} is finished, and its checkpoints are not here: fetch them with mirror"
            " --checkpoints, or leave out --step"
        )
    if not found:
        raise UserError(
            f"{flag} {root} is not finished and has no checkpoint yet: run its launch/train.py command again,"
            " with a smaller --save-every-steps to have one sooner"
        )
    candidates = found if step is None else [path for path in found if path.name == checkpoint_name(step)]
    if not candidates:
        steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in reversed(found))
        raise UserError(f"--step {step}: {flag} {root} has checkpoints of steps {steps}: choose one of them")
    for path in candidates:
        fault = fault_of_checkpoint(path)
        if fault is None:
            return read_checkpoint(path)
        _logger.warning("%s: not taking %s", fault, path)
    raise DamagedDataError(
        f"{flag} {root}: {len(candidates)} checkpoints are damaged, and none is whole: choose another --step,"
        " restore one from a copy, or continue the training, which renames them"
    )


def describe_checkpoint(checkpoint: Checkpoint) -> TrainedMemory:
    """The memory as the manifest describes it; `weights` is empty until `with_weights`.

    Raises:
        DamagedDataError: the manifest does not describe a memory.
    """
    path, values = checkpoint.path / "manifest.json", dict(checkpoint.manifest.subject)
    values.pop(IDENTITY_FIELD, None)  # of the run; an earlier program did not write it
    subject = from_json(
        MemorySubject,
        values,
        where=f"{path}, which is not of a memory,",
        version=CheckpointManifest.VERSION,
    )
    return TrainedMemory(
        sha256=sha256_of_file(path),
        memory=subject.memory,
        provenance=subject.provenance.after(checkpoint.step),
        weights={},
    )


def with_weights(trained: TrainedMemory, checkpoint: Checkpoint, output: Path) -> TrainedMemory:
    """The memory with its float32 weights, mapped from a file next to `output` that is already unlinked.

    RAM is bounded by the largest tensor.

    Raises:
        UserError: the disk is too small.
        DamagedDataError: the files do not hold these weights.
    """
    _logger.info(
        "taking the weights of %s (ZeRO stage %s, %s ranks)",
        checkpoint.path,
        checkpoint.manifest.zero_stage,
        checkpoint.manifest.world,
    )
    weights = weights_of_checkpoint(checkpoint)
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in Memory(MemoryConfig.from_dict(dict(trained.memory))).state_dict().items()
        }
    if shapes != {name: weight.shape for name, weight in weights.items()}:
        raise DamagedDataError(
            f"{checkpoint.path} holds other tensors than its memory has: choose another --step, or train it"
            " again"
        )
    require_free_bytes(
        output, sum(weight.num_bytes for weight in weights.values()), what="the checkpoint's weights"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    weights_file = output.with_name(f"{output.name}.weights")
    scratch = temporary_path(weights_file)
    remove_stale_temporaries_of(weights_file)
    try:
        write_safetensors(scratch, weights)
        tensors = load_file(scratch)  # mapped: the numbers outlive the file's name
    finally:
        scratch.unlink(missing_ok=True)
    if faulty := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise DamagedDataError(f"{checkpoint.path}: {faulty[0]} is not finite: choose an earlier --step")
    return dataclasses.replace(trained, weights=tensors)
