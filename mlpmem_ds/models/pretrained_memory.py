"""A trained memory that waits for its base.

This file travels with exported models as remote code: it imports torch and the standard library only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .capture_point import CapturePoint
from .memory import Memory
from .memory_config import MemoryConfig
from .mixture import StoredGate


@dataclass(frozen=True, kw_only=True)
class PretrainedMemory:
    """A trained memory without its base, and which of the base's states it reads.

    `lmbda` is None where none was chosen. `gate`, if the weight varies, and `base_only_threshold` are those
    of the export that it comes from. `provenance` holds plain values about how it was made.
    """

    module: Memory = field(repr=False)
    input_layer: int
    input_point: str
    input_earlier_layers: Sequence[int] = ()
    lmbda: float | None = None
    gate: StoredGate | None = field(default=None, repr=False)
    base_only_threshold: float | None = None
    vocabulary_sha256: str = ""
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_training(cls, path: str | Path) -> "PretrainedMemory":
        """From the output of a training: `weights/config.json` and `weights/model*.safetensors`.

        Raises:
            ValueError: there is no memory, or one that is damaged.
        """
        root = Path(path)
        from safetensors.torch import load_file  # comes with transformers

        try:
            description = json.loads((root / "weights" / "config.json").read_bytes())
            weights: dict[str, torch.Tensor] = {}
            for file in sorted((root / "weights").glob("model*.safetensors")):  # one, or several
                weights |= load_file(file)
            module = build_memory(description["memory"], weights)
            provenance = description["provenance"]
            layer, point = provenance["input_layer"], provenance["input_point"]
        except Exception as error:  # safetensors raises a family of its own
            raise ValueError(
                f"{root} holds no whole memory ({type(error).__name__}: {error}): finish its training"
            ) from error
        return cls(
            module=module.eval().requires_grad_(False),
            input_layer=layer,
            input_point=point,
            input_earlier_layers=provenance.get("input_earlier_layers", ()),
            lmbda=None,
            vocabulary_sha256=provenance.get("vocabulary_sha256", ""),
            provenance=provenance,
        )

    @property
    def point(self) -> CapturePoint:
        return CapturePoint.of(self)


def build_memory(settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Memory:
    """A memory of these settings that holds these tensors themselves, not copies.

    Raises:
        ValueError: the settings are none of a memory, or the weights are not of its shape.
    """
    with torch.device("meta"):
        memory = Memory(MemoryConfig.from_dict(dict(settings)))
    try:
        memory.load_state_dict(dict(weights), assign=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return memory
