"""Joint models of a base and a memory that a test has made itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.pretrained_memory import PretrainedMemory


def joined(
    base: PreTrainedModel,
    memory: Memory,
    *,
    lmbda: float,
    input_point: CapturePoint,
    further: Sequence[PretrainedMemory] = (),
    **facts: Any,
) -> MemoryAugmentedLM:
    """The base with the memory, which reads `input_point`; `facts` are further fields of PretrainedMemory."""
    first = PretrainedMemory(module=memory, **input_point.settings(), **facts)
    return MemoryAugmentedLM.join(base, [first, *further], lmbda=lmbda)
