"""Small exports of several families, for real engines: heads of 64, as their attention asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.gates import ConfidencesGate, HistoryGate, LearnedGate
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.pretrained_memory import PretrainedMemory
from mlpmem_ds.models.shared_head import head_fingerprint
from mlpmem_ds.models.structure import output_head

from ..joint_models import joined
from ..toy_tokenizers import byte_level

VOCAB, WIDTH, NUM_LAYERS, LENGTH = 384, 128, 4, 64
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
_LLAMA = {
    **_TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}
_GPT2 = {**_TOKENS, "n_embd": WIDTH, "n_layer": NUM_LAYERS, "n_head": 2, "n_positions": LENGTH}
SIZES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": {**_LLAMA, "tie_word_embeddings": True}, "gpt2": _GPT2}
LAST = CapturePoint(layer=-1, point="final_norm")


@dataclass(frozen=True, kw_only=True)
class Export:
    """An export, and its base alone, on disk; and the model that was saved."""

    joint: MemoryAugmentedLM
    directory: Path
    base: Path


def make_export(
    root: Path,
    family: str,
    point: CapturePoint,
    *,
    lmbda: float = 0.5,
    has_base_head: bool = False,
    further: Sequence[CapturePoint] = (),
    threshold: float | None = None,
    gate_class: type[ConfidencesGate | HistoryGate] | None = None,
    window: int = 1,
) -> Export:
    """One with peaked distributions, so that a mistake changes many tokens.

    `window` is that of the first memory.
    """
    base = _base(family)
    shared = head_fingerprint(output_head(base)[0]) if has_base_head else None
    joint = joined(
        base,
        _memory(point, 3, shared_head=shared, window=window),
        lmbda=lmbda,
        input_point=point,
        further=[
            PretrainedMemory(
                module=_memory(each, 10 + number),
                **each.settings(),
                lmbda=None,
                vocabulary_sha256="",
                provenance={},
            )
            for number, each in enumerate(further)
        ],
    )
    if gate_class is not None:
        num_memories = 1 + len(further)
        gate = gate_class(lmbdas=[lmbda / num_memories] * num_memories, hidden=8)
        _spread(gate, 5, 0.3)
        spread_features(gate)
        if isinstance(gate, HistoryGate):  # else λ is near 0 or 1, whatever the history says
            gate.scale[: -gate.history.size] *= 0.3
        joint.set_gate(gate)
    joint.base_only_threshold = threshold
    for directory, model in ((root / "export", joint), (root / "base", base)):
        model.save_pretrained(directory)
        byte_level().save_pretrained(directory)
    return Export(joint=joint, directory=root / "export", base=root / "base")


def spread_features(gate: LearnedGate) -> None:
    """Means and deviations far from those of a new gate: a loader that forgets its buffers shows."""
    count = len(gate.mean)
    gate.standardize(torch.linspace(-1.0, 1.0, count), torch.linspace(0.5, 2.0, count))


def _base(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    base: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES[family]))
    _spread(base, 2, 0.1)
    return base.eval().requires_grad_(False)


def _memory(point: CapturePoint, seed: int, *, window: int = 1, **changes: object) -> Memory:
    values = {
        "input_size": WIDTH * len(point.parts) * window,
        "window": window,
        "hidden_size": WIDTH,
        "intermediate_size": 192,
        "num_blocks": 2,
        "vocab_size": VOCAB,
        "family": "swiglu",
        **changes,
    }
    torch.manual_seed(seed)
    memory = Memory(MemoryConfig.from_dict(values))
    _spread(memory, seed, 0.15)
    return memory


def _spread(model: nn.Module, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
