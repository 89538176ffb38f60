"""Joint models of a base and a memory that a test has made itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, RwkvConfig

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
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


def joint_that_reads_padding(vocab_size: int) -> MemoryAugmentedLM:
    """A random RWKV base, which takes an attention mask and does not heed it, and a random memory."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    config = RwkvConfig(
        vocab_size=vocab_size,
        attention_hidden_size=24,
        context_length=64,
        bos_token_id=0,
        eos_token_id=0,
        **sizes,
    )
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    memory = Memory(
        MemoryConfig(input_size=24, hidden_size=16, intermediate_size=24, num_blocks=1, vocab_size=vocab_size)
    ).requires_grad_(False)
    for values in (*base.parameters(), *memory.parameters()):
        if values.dim() > 1:
            torch.nn.init.normal_(values, std=0.3)
    point = CapturePoint(layer=-1, point="layer_output")
    provenance = {"input_layers_path": "rwkv.blocks"}
    return joined(base, memory, lmbda=0.4, input_point=point, provenance=provenance)
