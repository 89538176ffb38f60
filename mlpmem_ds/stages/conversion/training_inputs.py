"""Part of `convert_checkpoint` and `generate`: the base of a memory, as its keys name it."""

from __future__ import annotations

from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.run_description import find_input, flags_of_run
from mlpmem_ds.formats.trained_models import TrainedMemory


def model_of_keys(checkpoint: Path, trained: TrainedMemory) -> str:
    """The base that the memory reads, as the flags of its keys name it.

    Raises:
        UserError: the keys are not on this disk.
    """
    keys = find_input(checkpoint, "keys", trained.provenance.keys)
    flags = {} if keys is None else flags_of_run(keys)
    model = flags.get("input_model") or flags.get("model")
    if not model:
        raise UserError(
            f"--model is needed: the keys that --checkpoint {checkpoint} was trained from are not on this"
            " disk, and they name the base"
        )
    return str(model)
