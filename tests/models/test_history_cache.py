"""A gate's history in generation: at every step the weights that one forward of the whole sequence gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.history_cache import HistoryLayer
from mlpmem_ds.models.mixture import GateInputs

from .carried_generation import (
    NEW,
    WAYS,
    assert_a_reset_cache_is_a_new_one,
    assert_a_step_with_a_static_cache_compiles_whole,
    assert_assisted_generation_takes_rejected_tokens_back,
    assert_every_cache_gives_what_none_gives,
    generate,
    set_history_gate,
)
from .conftest import BASES, PAD, POINT, random_ids, tiny_joint

LENGTHS = (3, 8, 5)
LAST = CapturePoint(layer=-1, point="layer_output")


def with_history(family: str, *, num_memories: int = 1) -> MemoryAugmentedLM:
    """A joint model whose gate's weights vary much with what came before."""
    joint = tiny_joint(family, num_memories=num_memories)
    set_history_gate(joint)
    return joint


class Weights:
    """All that the gate gave, step by step."""

    def __init__(self, joint: MemoryAugmentedLM) -> None:
        self.given: list[torch.Tensor] = []
        self._handle = joint.gate.register_forward_hook(lambda _, args, output: self.given.append(output))  # type: ignore[attr-defined]

    def __enter__(self) -> list[torch.Tensor]:
        return self.given

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@torch.no_grad()
def defined_weights(joint: MemoryAugmentedLM, ids_S: torch.Tensor) -> torch.Tensor:
    """λ at each position of one sequence, token by token as the history is defined, [S] or [S, M]."""
    gate: Any = joint.gate
    points = [POINT, LAST][: len(joint.memories)]
    states = capture(joint.base, points)(ids_S[None]).states
    base_SV = joint.base(ids_S[None]).logits[0]
    memories = [
        memory.head(memory(states[point][0])) for memory, point in zip(joint.memories, points, strict=True)
    ]
    history, weights = gate.history.start(), []
    for at, token in enumerate(ids_S.tolist()):
        if at:
            log_p = [logits[at - 1].double().log_softmax(-1)[token] for logits in (base_SV, *memories)]
            history = gate.history.update(history, log_p[0], torch.stack(log_p[1:]))
        known = {"base_logits": base_SV[at], "memory_logits": tuple(logits[at] for logits in memories)}
        weights.append(gate(GateInputs(**known, history=history)))
    return torch.stack(weights)


@torch.no_grad()
@pytest.mark.parametrize("num_memories", [1, 2])
@pytest.mark.parametrize("family", BASES)
def test_one_forward_weighs_as_the_history_is_defined(family: str, num_memories: int) -> None:
    joint, ids_BS = with_history(family, num_memories=num_memories), random_ids(2, 11)
    with Weights(joint) as given:
        whole = joint(ids_BS, use_cache=False).logits
        joint(ids_BS, use_cache=False, logits_to_keep=3)
        joint(ids_BS, use_cache=False, logits_to_keep=torch.tensor([2, 9]))
    expected = torch.stack([defined_weights(joint, ids_S) for ids_S in ids_BS])
    assert float(expected.std()) > 0.03
    torch.testing.assert_close(given[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given[1], expected[:, -3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given[2], expected[:, [2, 9]], rtol=1e-4, atol=1e-5)
    totals = joint.base(ids_BS).logits.logsumexp(-1)
    torch.testing.assert_close(whole.logsumexp(-1), totals, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", BASES)
def test_each_step_weighs_as_one_forward_of_the_whole(family: str) -> None:
    joint = with_history(family, num_memories=2 if family == "llama" else 1)
    for way in ("greedy", "sampling"):
        with Weights(joint) as given:
            sequences = generate(joint, way, lengths=LENGTHS).sequences
        weights = torch.cat(given, dim=1)
        assert weights.shape[:2] == (3, NEW)
        for row, num_given in enumerate((3, 8, 5)):
            alone = sequences[row, 8 - num_given :]
            expected = defined_weights(joint, alone)[num_given - 1 : -1]
            torch.testing.assert_close(weights[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_every_cache_gives_what_none_gives(family: str, way: str) -> None:
    layers = assert_every_cache_gives_what_none_gives(with_history(family), way, lengths=LENGTHS)
    assert sum(isinstance(layer, HistoryLayer) for layer in layers) == 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_assisted_generation_takes_rejected_tokens_back(family: str) -> None:
    assert_assisted_generation_takes_rejected_tokens_back(with_history(family))


def test_a_reset_cache_is_a_new_one() -> None:
    assert_a_reset_cache_is_a_new_one(with_history("gpt2"))


@torch.no_grad()
def test_a_cache_goes_on_where_it_was_and_a_new_one_begins_anew() -> None:
    joint, ids_BS = with_history("llama"), random_ids(2, 12)
    whole = joint(ids_BS, use_cache=False).logits
    cache = DynamicCache()
    parts = [
        joint(ids_BS[:, start:stop], past_key_values=cache, use_cache=True).logits
        for start, stop in ((0, 5), (5, 6), (6, 9))
    ]
    kept = copy.deepcopy(cache)
    parts.append(joint(ids_BS[:, 9:], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(joint(ids_BS).logits, whole, rtol=0, atol=0)

    again = joint(ids_BS[:, 9:], past_key_values=copy.deepcopy(kept)).logits
    assert torch.equal(again, parts[-1])
    kept.batch_repeat_interleave(2)
    kept.batch_select_indices(torch.tensor([3, 0]))
    swapped = joint(ids_BS[[1, 0], 9:], past_key_values=kept).logits
    torch.testing.assert_close(swapped, parts[-1][[1, 0]], rtol=1e-5, atol=1e-5)

    last = joint(ids_BS, use_cache=True, logits_to_keep=4)
    last.past_key_values.crop(-3)
    torch.testing.assert_close(
        joint(ids_BS[:, 9:], past_key_values=last.past_key_values).logits, whole[:, 9:], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="cropped by 3 tokens.*let the base be the assistant"):
        joint(ids_BS, use_cache=True, logits_to_keep=3).past_key_values.crop(-3)


@torch.no_grad()
def test_what_has_no_history_is_refused() -> None:
    joint, ids_BS = with_history("llama"), random_ids(2, 6)
    others = joint.base(ids_BS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 6 tokens and no history"):
        joint(ids_BS[:, :1], past_key_values=others)
    own = joint(ids_BS, use_cache=True).past_key_values
    joint.base(ids_BS[:, :1], past_key_values=own)
    with pytest.raises(ValueError, match="holds 7 tokens and the history of 6"):
        joint(ids_BS[:, :1], past_key_values=own)
    with pytest.raises(ValueError, match="give input_ids"):
        joint(inputs_embeds=joint.get_input_embeddings()(ids_BS))
    with pytest.raises(ValueError, match="needs a cache with a list of layers"):
        joint(ids_BS, past_key_values=object())
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="token_mask"):
        joint(ids_BS, attention_mask=mask)
    given = joint(ids_BS, attention_mask=mask, token_mask=torch.ones(2, 6), use_cache=False).logits
    torch.testing.assert_close(given, joint(ids_BS, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_with_a_static_cache_compiles_whole(family: str) -> None:
    def tensors_of(layer: Any) -> list[torch.Tensor]:
        return [layer.states, *layer.log_probabilities]

    assert_a_step_with_a_static_cache_compiles_whole(with_history(family), HistoryLayer, tensors_of, 1e-4)


@torch.no_grad()
def test_heads_run_once_a_token() -> None:
    """On the rows whose logits are asked for; for the tokens of a prompt once, and once more on its last."""
    joint, prompt = with_history("llama"), random_ids(1, 9)
    rows: dict[str, list[int]] = {"base": [], "memory": []}
    for name, head in (("base", joint.base.get_output_embeddings()), ("memory", joint.memory.head)):
        head.register_forward_pre_hook(
            lambda _, inputs, seen=rows[name]: seen.append(inputs[0].numel() // inputs[0].shape[-1])
        )
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    for more in ({}, {"cache_implementation": "static"}):
        joint.generate(prompt, **options, **more)
        assert rows == {"base": [9, 1, 1, 1, 1], "memory": [1, 8, 1, 1, 1, 1]}
        for seen in rows.values():
            seen.clear()
    joint(prompt)
    assert rows == {"base": [9], "memory": [9]}
    for seen in rows.values():
        seen.clear()
    joint.generate(prompt, **options, prompt_lookup_num_tokens=3)
    assert rows["memory"][2:] == rows["base"][1:]  # tokens that were guessed, checked at once


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_without_padding(family: str) -> None:
    """transformers then leaves the mask out, and a static cache needs one of its own."""
    joint = with_history(family)
    for way in ("greedy", "beams"):
        assert_every_cache_gives_what_none_gives(joint, way, lengths=(8, 8, 8))
