"""What a joint model is put together from: the memories of one base, which state each reads, and the checks.

This file travels with exported models as remote code: it imports torch, transformers and the standard library
only.

Shapes: B sequences, S tokens, K kept positions, D width of the base, V vocabulary, `...` any further
dimensions.
"""

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .backbone import resolved_point, state_width
from .capture_point import CapturePoint
from .hf_config import MemoryAugmentedConfig
from .memory import Memory
from .memory_config import MemoryConfig
from .mixture import Constant, StoredGate, Weights
from .pretrained_memory import PretrainedMemory
from .shared_head import head_fingerprint
from .structure import output_head
from .window_cache import Windows

MEMORY_INPUT = "memory_input"
"""Name of the state that the (first) memory reads; a gate finds it in `GateInputs.states` too."""


def input_name(number: int) -> str:
    """Name of the state that a bank's memory of this number, from 0, reads."""
    return MEMORY_INPUT if number == 0 else f"{MEMORY_INPUT}_{number}"


def windows_of(memories: Sequence[Memory]) -> Windows:
    """The memories that read the states of several positions."""
    sizes = {input_name(number): memory.config.window for number, memory in enumerate(memories)}
    return Windows(sizes={name: window for name, window in sizes.items() if window > 1})


def described_memories(config: MemoryAugmentedConfig) -> list[Mapping[str, Any]]:
    """Of each memory in turn its `memory_config`, and of `CapturePoint.settings` what it reads."""
    assert config.memory_config is not None
    first = {
        "memory_config": config.memory_config,
        **CapturePoint.of(config).settings(),
    }
    return [first, *config.further_memories]


def input_points(config: MemoryAugmentedConfig, base: PreTrainedModel) -> dict[str, CapturePoint]:
    """Where each memory's state is read, by its name. Raises ValueError for a layer that the base lacks."""
    names = ("input_layer", "input_point", "input_earlier_layers")
    settings = [{name: memory[name] for name in names} for memory in described_memories(config)]
    return {
        input_name(number): resolved_point(base, CapturePoint.of(SimpleNamespace(**each)), config.layers_path)
        for number, each in enumerate(settings)
    }


def check_sizes(memory: MemoryConfig, base_model: PreTrainedModel, point: CapturePoint) -> None:
    """Raises ValueError unless the memory reads states of this base's width, predicts its tokens, and was
    trained with its output head where it has no own."""
    weight_VD, _ = output_head(base_model)
    if not weight_VD.is_floating_point():
        raise ValueError(
            "the base's output head is quantized, and memories need it as it is: leave it out of the"
            " quantization (llm_int8_skip_modules or modules_to_not_convert, with its name)"
        )
    if memory.vocab_size != weight_VD.shape[0]:
        raise ValueError(
            f"the memory predicts {memory.vocab_size} tokens and the base {weight_VD.shape[0]}: "
            "they must come from one vocabulary; give the base that the memory was trained for"
        )
    width = memory.window * state_width(base_model, point)
    if memory.input_size != width:
        positions = f" in {memory.window} positions" if memory.window > 1 else ""
        raise ValueError(
            f"the memory reads vectors of {memory.input_size} numbers and {point.point} of the base has"
            f" {width}{positions}: give the base that the memory was trained for"
        )
    # A head on disk, of a base that is spread over devices, is not read for this.
    is_checked = memory.shared_head is not None and not weight_VD.is_meta
    if is_checked and head_fingerprint(weight_VD) != memory.shared_head:
        raise ValueError(
            "the memory uses the output head of the base that it was trained for, and this base has another:"
            " give the base that the memory was trained for"
        )


def joint_config(
    base_model: PreTrainedModel,
    memories: Sequence[PretrainedMemory],
    *,
    lmbda: float,
) -> MemoryAugmentedConfig:
    """The configuration of a base and its memories; where its layers are is said by the first's provenance.

    Raises:
        ValueError: they do not fit each other, or lmbda is not in [0, 1].
    """
    layers_path = memories[0].provenance.get("input_layers_path")
    described: list[dict[str, Any]] = []
    for memory in memories:
        check_sizes(memory.module.config, base_model, memory.point)
        described.append(
            {
                "memory_config": memory.module.config.to_dict(),
                **resolved_point(base_model, memory.point, layers_path).settings(),
                "provenance": memory.provenance,
            }
        )
    return MemoryAugmentedConfig(
        base_config=base_model.config,
        **described[0],
        lmbda=lmbda,
        further_memories=described[1:],
        layers_path=layers_path,
        vocabulary_sha256=memories[0].vocabulary_sha256,
        dtype=base_model.dtype,
    )


def plain_memory(memory: Memory) -> Memory:
    """A memory with the same tensors and a plain head; casting it leaves the given one alone."""
    with torch.device("meta"):
        plain = Memory(memory.config)
    plain.load_state_dict(memory.state_dict(), assign=True)
    return plain


def checked_gate(gate: StoredGate, num_memories: int) -> StoredGate:
    """The gate; the weights of a learned one are few, and stay float32 where the model is rounded.

    Raises:
        ValueError: it is of another number of memories.
    """
    expected = len(gate.lmbdas) if isinstance(gate, Weights) else getattr(gate, "num_memories", None)
    if expected not in (None, num_memories):
        raise ValueError(
            f"the gate ({gate}) is of {expected} memories, and the model has {num_memories}: give the gate"
            " that was fitted for these"
        )
    return gate.float() if isinstance(gate, nn.Module) else gate


def copied_gate(gate: StoredGate, device: torch.device) -> StoredGate:
    """A gate with the same weights, on this device; the given one stays as it is."""
    copied = copy.deepcopy(gate)
    return copied.to(device) if isinstance(copied, nn.Module) else copied


def is_nothing(gate: StoredGate) -> bool:
    """Whether the weight of every memory is 0 at every position."""
    if isinstance(gate, Weights):
        return not any(gate.lmbdas)
    return isinstance(gate, Constant) and gate.lmbda == 0.0


def kept_positions(values_BS: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions for which the base gives logits, of `[B, S, ...]`, by transformers' rule: the last ones
    (0: all), or indices."""
    if isinstance(logits_to_keep, int):
        return values_BS[:, -logits_to_keep:] if logits_to_keep else values_BS
    if logits_to_keep.ndim == 2 and logits_to_keep.dtype == torch.bool:
        return values_BS[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(values_BS, logits_to_keep[..., None], dim=1)
    return values_BS[:, logits_to_keep]


def token_mask_of(inputs: Mapping[str, Any], attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which of the new tokens of a step of `generate` are no padding `[B, S]`; None: it cannot be known here.

    Args:
        inputs: of the base's forward. For a static cache they hold a mask of attention, from which padding
            cannot be read.
        attention_mask: as `generate` has it, `[B, length]`; None: nothing is padding, and it has left it out.
    """
    ids = inputs.get("input_ids")
    new_BS: torch.Tensor = inputs["inputs_embeds"][..., 0] if ids is None else ids
    if attention_mask is None:
        return torch.ones_like(new_BS, dtype=torch.bool)
    if attention_mask.ndim != 2:
        return None
    return attention_mask[:, -new_BS.shape[1] :].to(new_BS.device)


def real_tokens(ids_BS: torch.Tensor, token_mask: torch.Tensor | None, attention_mask: Any) -> torch.Tensor:
    """Which of the new tokens are no padding, bool `[B, S]`.

    Args:
        ids_BS: the new tokens, or anything of their shape.
        token_mask: of these tokens `[B, S]`, as the joint model hands it to itself in generation.
        attention_mask: of the whole sequence `[B, length]`; None: there is no padding.

    Raises:
        ValueError: the mask is one of attention, from which padding cannot be read.
    """
    mask = attention_mask if token_mask is None else token_mask
    if mask is None:
        return torch.ones_like(ids_BS, dtype=torch.bool)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise ValueError(
            "a gate with a history or a memory with a window must know which tokens are padding, and"
            " attention_mask is not [B, length]: give such a one, or its last columns as token_mask [B, S]"
        )
    return mask[:, -ids_BS.shape[1] :].bool()
