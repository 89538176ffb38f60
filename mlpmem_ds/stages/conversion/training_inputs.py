"""Part of `convert_checkpoint` and `generate`: what a memory was trained from, where it is still on this
disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.core.run_description import read_description
from mlpmem_ds.formats.trained_models import TrainedMemory


def input_of_training(checkpoint: Path, name: str, sha256: str | None) -> Path | None:
    """The directory that a memory was trained from, as the training's flags or the run's layout name it.

    None unless its manifest has this hash, which the memory's provenance gives.
    """
    for path in (_flags_of(checkpoint).get(name), checkpoint.resolve().parent / name):
        if not path or not (Path(path) / "manifest.json").is_file():
            continue
        if sha256_of_file(Path(path) / "manifest.json") == sha256:
            return Path(path)
    return None


def model_of_keys(checkpoint: Path, trained: TrainedMemory) -> str:
    """The base that the memory reads, as the flags of its keys name it.

    Raises:
        UserError: the keys are not on this disk.
    """
    keys = input_of_training(checkpoint, "keys", trained.provenance.keys)
    flags = {} if keys is None else _flags_of(keys)
    model = flags.get("input_model") or flags.get("model")
    if not model:
        raise UserError(
            f"--model is needed: the keys that --checkpoint {checkpoint} was trained from are not on this"
            " disk, and they name the base"
        )
    return str(model)


def _flags_of(root: Path) -> Mapping[str, Any]:
    """The flags of a stage's latest start."""
    flags: Mapping[str, Any] = read_description(root).get("config", {})
    return flags
