"""A memory with a window in generation: each step gives what one forward of the whole sequence gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.history_cache import HistoryLayer
from mlpmem_ds.models.mixture import log_mixture, log_mixture_of_bank
from mlpmem_ds.models.past_states import with_past
from mlpmem_ds.models.pretrained_memory import PretrainedMemory
from mlpmem_ds.models.window_cache import WindowLayer, with_window

from .carried_generation import (
    assert_a_reset_cache_is_a_new_one,
    assert_a_step_with_a_static_cache_compiles_whole,
    assert_assisted_generation_takes_rejected_tokens_back,
    assert_every_cache_gives_what_none_gives,
    generate,
    set_history_gate,
)
from .conftest import BASES, PAD, VOCAB, WIDTH, random_ids, tiny_base, tiny_memory

LENGTHS = (2, 8, 5)
WINDOW, OTHER = 4, 2
DEPTHS = CapturePoint(layer=-1, point="layer_output", earlier=(0,))
LAST = CapturePoint(layer=-1, point="layer_output")
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def joint_of(family: str, *, num_memories: int = 1, history: bool = False) -> MemoryAugmentedLM:
    """A memory of two depths and a window of 4; a second one has a window of 2."""
    parts = [(WINDOW, DEPTHS, 2), (OTHER, LAST, 1)][:num_memories]
    memories = [
        PretrainedMemory(
            module=tiny_memory(seed=30 + window, input_size=window * depths * WIDTH, window=window),
            **point.settings(),
            lmbda=0.4,
            vocabulary_sha256="",
            provenance={},
        )
        for window, point, depths in parts
    ]
    joint = MemoryAugmentedLM.join(tiny_base(family).double(), memories, lmbda=0.4)
    joint.mixture = double_mixture
    if history:
        set_history_gate(joint)
    return joint


def double_mixture(base: torch.Tensor, memory: torch.Tensor, lmbda: float | torch.Tensor) -> torch.Tensor:
    return log_mixture(base.log_softmax(-1), memory.log_softmax(-1), lmbda)


@torch.no_grad()
def defined(joint: MemoryAugmentedLM, ids_S: torch.Tensor) -> torch.Tensor:
    """log p of one sequence without padding, [S, V], from the stored states' own function."""
    points = [DEPTHS, LAST][: len(joint.memories)]
    states = capture(joint.base, points)(ids_S[None]).states
    base_SV = joint.base(ids_S[None]).logits[0].log_softmax(-1)
    memories = []
    for memory, point in zip(joint.memories, points, strict=True):
        hidden = memory(with_past(states[point][0], memory.config.window - 1))
        memories.append(memory.head(hidden).log_softmax(-1))
    if len(memories) == 1:
        return log_mixture(base_SV, memories[0], joint.lmbda)
    share = torch.full((len(memories),), joint.lmbda / len(memories), dtype=torch.float64)
    return log_mixture_of_bank(base_SV, memories, share)


def test_windows_are_those_of_stored_states_and_end_at_padding() -> None:
    states = torch.randn(2, 9, 3)
    states[1, 3] = torch.nan  # as at padding
    is_real = torch.ones(2, 9, dtype=torch.bool)
    is_real[0, :2] = False  # on the left
    is_real[1, 3] = False  # in the middle: what comes after begins anew
    nothing = torch.zeros(2, 2, 3)
    states, is_real = torch.cat([nothing, states], 1), torch.cat([nothing[..., 0].bool(), is_real], 1)
    found = with_window(states, is_real, 3, 9)
    states = states[:, 2:]
    torch.testing.assert_close(found[0, 2:], with_past(states[0, 2:], 2))
    torch.testing.assert_close(found[1, :3], with_past(states[1, :3], 2))
    torch.testing.assert_close(found[1, 4:], with_past(states[1, 4:], 2))
    assert torch.equal(with_window(states, is_real[:, 2:], 3, 2), found[:, -2:])


@torch.no_grad()
@pytest.mark.parametrize("num_memories", [1, 2])
@pytest.mark.parametrize("family", BASES)
def test_one_forward_reads_the_windows(family: str, num_memories: int) -> None:
    joint, ids_BS = joint_of(family, num_memories=num_memories), random_ids(2, 9)
    expected = torch.stack([defined(joint, ids_S) for ids_S in ids_BS])
    tolerance = TIGHT if num_memories == 1 else {"rtol": 1e-5, "atol": 1e-5}
    expected = expected.to(joint(ids_BS).logits.dtype)  # a bank is mixed in float32
    torch.testing.assert_close(joint(ids_BS).logits.log_softmax(-1), expected, **tolerance)
    some = joint(ids_BS, logits_to_keep=3).logits.log_softmax(-1)
    torch.testing.assert_close(some, expected[:, -3:], **tolerance)
    some = joint(ids_BS, logits_to_keep=torch.tensor([2, 7])).logits.log_softmax(-1)
    torch.testing.assert_close(some, expected[:, [2, 7]], **tolerance)
    embeds = joint.get_input_embeddings()(ids_BS)
    torch.testing.assert_close(joint(inputs_embeds=embeds).logits.log_softmax(-1), expected, **tolerance)
    mask = torch.ones_like(ids_BS)
    mask[0, 6:] = 0  # on the right, as the harness pads
    right = joint(ids_BS.where(mask.bool(), PAD), attention_mask=mask).logits.log_softmax(-1)
    torch.testing.assert_close(right[0, :6], expected[0, :6], **tolerance)
    torch.testing.assert_close(right[1], expected[1], **tolerance)
    joint.lmbda = 1.0  # and the memory counts
    before = joint(ids_BS).logits
    ids_BS[:, 4] = (ids_BS[:, 4] + 1) % VOCAB
    assert (joint(ids_BS).logits - before)[:, 5:].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}])
def test_each_step_gives_what_the_whole_sequence_gives(family: str, options: dict[str, Any]) -> None:
    joint = joint_of(family)
    for way in ("greedy", "several sequences"):
        found = generate(joint, way, lengths=LENGTHS, **options)
        logits = torch.stack(found.logits, dim=1)
        copies = len(logits) // 3
        for row, sequence in enumerate(found.sequences):
            start = 8 - LENGTHS[row // copies]
            expected = defined(joint, sequence[start:])[7 - start : -1]
            torch.testing.assert_close(logits[row].double().log_softmax(-1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["greedy", "several sequences", "beams"])
@pytest.mark.parametrize("history", [False, True])
def test_every_cache_gives_what_none_gives(way: str, history: bool) -> None:
    joint = joint_of("gemma2" if history else "llama", num_memories=2, history=history)
    joint = joint.float() if history else joint  # Gemma 2 itself gives NaN at padding in float64
    layers = assert_every_cache_gives_what_none_gives(joint, way, lengths=LENGTHS)
    assert sum(isinstance(layer, WindowLayer) for layer in layers) == 1
    assert sum(isinstance(layer, HistoryLayer) for layer in layers) == history


@pytest.mark.parametrize("history", [False, True])
def test_assisted_generation_takes_rejected_tokens_back(history: bool) -> None:
    assert_assisted_generation_takes_rejected_tokens_back(joint_of("gpt2", history=history))


def test_a_reset_cache_is_a_new_one() -> None:
    assert_a_reset_cache_is_a_new_one(joint_of("gpt2", history=True))


@torch.no_grad()
def test_a_cache_goes_on_where_it_was_and_a_new_one_begins_anew() -> None:
    joint, ids_BS = joint_of("llama"), random_ids(2, 12)
    whole = joint(ids_BS, use_cache=False).logits
    cache = DynamicCache()
    parts = [
        joint(ids_BS[:, start:stop], past_key_values=cache, use_cache=True).logits
        for start, stop in ((0, 1), (1, 5), (5, 6), (6, 9))
    ]
    kept = copy.deepcopy(cache)
    parts.append(joint(ids_BS[:, 9:], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TIGHT)
    kept.batch_repeat_interleave(2)
    kept.batch_select_indices(torch.tensor([3, 0]))
    swapped = joint(ids_BS[[1, 0], 9:], past_key_values=kept).logits
    torch.testing.assert_close(swapped, parts[-1][[1, 0]], **TIGHT)

    last = joint(ids_BS, use_cache=True, logits_to_keep=4)
    last.past_key_values.crop(-3)
    again = joint(ids_BS[:, 9:], past_key_values=last.past_key_values).logits
    torch.testing.assert_close(again, whole[:, 9:], **TIGHT)
    with pytest.raises(ValueError, match="cropped by 3 tokens, and a memory's window is kept for the last 2"):
        joint(ids_BS, use_cache=True, logits_to_keep=3).past_key_values.crop(-3)
    others = joint.base(ids_BS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 12 tokens and no window"):
        joint(ids_BS[:, :1], past_key_values=others)
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="a memory with a window must know which tokens are padding"):
        joint(ids_BS, attention_mask=mask)


@torch.no_grad()
def test_a_step_with_a_static_cache_compiles_whole() -> None:
    assert_a_step_with_a_static_cache_compiles_whole(
        joint_of("llama"), WindowLayer, lambda layer: layer.tensors, 1e-5
    )


@torch.no_grad()
def test_an_export_keeps_the_windows(tmp_path: Path) -> None:
    joint = joint_of("llama", num_memories=2)
    joint.save_pretrained(tmp_path / "export")
    again = MemoryAugmentedLM.from_pretrained(tmp_path / "export", dtype=torch.float64)
    ids_BS = random_ids(2, 7)
    torch.testing.assert_close(again(ids_BS).logits, joint(ids_BS).logits, rtol=1e-5, atol=1e-5)
    narrow = tiny_memory(input_size=3 * WIDTH, window=2)
    waiting = PretrainedMemory(
        module=narrow, **LAST.settings(), lmbda=None, vocabulary_sha256="", provenance={}
    )
    with pytest.raises(ValueError, match=f"of {3 * WIDTH} numbers .* has {2 * WIDTH} in 2 positions"):
        MemoryAugmentedLM.join(tiny_base("llama"), [waiting])


@torch.no_grad()
def test_prompts_without_padding_and_of_embeddings() -> None:
    joint = joint_of("llama")
    assert_every_cache_gives_what_none_gives(joint, "greedy", lengths=(8, 8, 8))
    ids_BS = random_ids(2, 8)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    expected = joint.generate(ids_BS, **options)[:, 8:]
    embeds = joint.get_input_embeddings()(ids_BS)
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(joint.generate(inputs_embeds=embeds, **options, **more), expected)
