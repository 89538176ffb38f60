"""Generation with what a cache carries besides the base's own (history, window), in every way and cache; what
holds for each of them, as functions that assert it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache

from mlpmem_ds.models.gates import HistoryGate
from mlpmem_ds.models.hf import MemoryAugmentedLM

from .conftest import PAD, random_ids

NEW = 7
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "several sequences": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
}


def set_history_gate(joint: MemoryAugmentedLM) -> None:
    """A gate whose weights vary much with what came before."""
    num_memories = len(joint.memories)
    torch.manual_seed(12)
    gate = HistoryGate(lmbdas=(0.4 / num_memories,) * num_memories)
    joint.set_gate(gate.eval().requires_grad_(False))
    seen: list[torch.Tensor] = []
    handle = gate.register_forward_pre_hook(lambda _, args: seen.append(gate.features(args[0])))
    joint(random_ids(2, 11), use_cache=False)
    handle.remove()
    gate.standardize(seen[0].mean(dim=(0, 1)), seen[0].std(dim=(0, 1)))
    nn.init.normal_(gate.out.weight, std=0.5)


def padded(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of these lengths, padded on the left to 8 tokens, and their mask."""
    tokens, mask = random_ids(3, 8), torch.ones(3, 8, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, : 8 - length], mask[row, : 8 - length] = PAD, 0
    return tokens, mask


def generate(joint: MemoryAugmentedLM, way: str, *, lengths: Sequence[int], **options: Any) -> Any:
    tokens, mask = padded(lengths)
    torch.manual_seed(13)
    settings = GenerationConfig(
        max_new_tokens=NEW,
        pad_token_id=PAD,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **{**WAYS[way], **options},
    )
    return joint.generate(tokens, attention_mask=mask, generation_config=settings)


def assert_every_cache_gives_what_none_gives(
    joint: MemoryAugmentedLM, way: str, *, lengths: Sequence[int]
) -> list[Any]:
    """The layers of the last one's cache."""
    bare = generate(joint, way, lengths=lengths, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        found = generate(joint, way, lengths=lengths, **options)
        assert torch.equal(found.sequences, bare.sequences), options
        for one, other in zip(found.logits, bare.logits, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    return list(found.past_key_values.layers)


def assert_assisted_generation_takes_rejected_tokens_back(joint: MemoryAugmentedLM) -> None:
    prompt = random_ids(1, 6)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    plain = joint.generate(prompt, **options)
    assert torch.equal(joint.generate(prompt, **options, assistant_model=joint.base), plain)
    assert torch.equal(joint.generate(prompt, **options, prompt_lookup_num_tokens=3), plain)


@torch.no_grad()
def assert_a_reset_cache_is_a_new_one(joint: MemoryAugmentedLM) -> None:
    """Also for another number of sequences."""
    cache = DynamicCache(config=joint.base.config)
    for num_sequences in (2, 3):
        ids_BS = random_ids(num_sequences, 7)
        parts = [
            joint(part_BS, past_key_values=cache, use_cache=True).logits
            for part_BS in ids_BS.split([1, 5, 1], dim=1)
        ]
        whole = joint(ids_BS, use_cache=False).logits
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        cache.reset()


def assert_a_step_with_a_static_cache_compiles_whole(
    joint: MemoryAugmentedLM,
    layer_kind: type,
    tensors_of: Callable[[Any], Sequence[torch.Tensor]],
    error: float,
) -> None:
    """And what the layer carries stays where it is, also after the cache is reset."""
    ids_BS = random_ids(2, 7)
    whole = joint(torch.cat([ids_BS, ids_BS[:, :3]], dim=1), use_cache=False).logits
    compiled = torch.compile(joint, fullgraph=True, backend="eager")
    cache = StaticCache(config=joint.base.config, max_cache_len=12)
    for turn in range(2):
        joint(ids_BS, past_key_values=cache, use_cache=True)
        [layer] = [layer for layer in cache.layers if isinstance(layer, layer_kind)]
        addresses = [values.data_ptr() for values in tensors_of(layer)]
        for step in range(3):
            inputs = {"input_ids": ids_BS[:, step : step + 1], "position_ids": torch.full((2, 1), 7 + step)}
            found = compiled(**inputs, past_key_values=cache, use_cache=True).logits
            expected = whole[:, 7 + step : 8 + step]
            torch.testing.assert_close(found.to(whole.dtype), expected, rtol=error, atol=error)
        assert addresses == [values.data_ptr() for values in tensors_of(layer)], turn
        cache.reset()
    torch.compiler.reset()
