"""Part of `view_report` and `generate`: what base and memory say of each token of a text.

The joint model is asked through its public forward alone, once with each weight: 0 gives the base, all of the
weight on one memory gives that memory, its own gate the mixture. The weights of the gate are then what makes
the first the last: λ of p = p_base + Σ λ_m (p_m - p_base), by least squares over the vocabulary.

Long texts are looked at in blocks, of which each needs passes over the whole text: the probabilities of all
their positions would be many GB.

S tokens, T of them in a block, V vocabulary, M memories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.joint_step import BaseOnly
from mlpmem_ds.models.mixture import Constant, StoredGate, Weights
from mlpmem_ds.stages.generation.text import GrowingText

_HELD_PROBABILITIES = 2**27
"""of base, mixture and memories at once, 8 bytes each"""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A token that was likely."""

    text: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What base and memory predicted in the place of a token. Of a bank, the memories at the gate's
    weights."""

    base: float
    """probability of the token"""
    memory: float
    joint: float
    weight: float
    """λ, of all memories together"""
    base_is_right: bool
    """the token was the likeliest"""
    memory_is_right: bool
    base_top: tuple[Candidate, ...]
    memory_top: tuple[Candidate, ...]


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """A token of a text."""

    text: str
    """what it adds to the text before it; "" where a character is not finished"""
    opinion: Opinion | None
    """None for the first of a text, which nothing predicts"""


@torch.no_grad()
def views_of(
    model: MemoryAugmentedLM, tokenizer: Any, ids: Sequence[int], *, num_context: int = 0, num_top: int = 5
) -> list[TokenView]:
    """The tokens of a text after the first `num_context`, which are read only.

    Args:
        model: its gate is as before afterwards, and its counts (`base_only`) too.
        tokenizer: of the ids.
        ids: at most as many as the base reads.
        num_context: tokens at the beginning that are not shown, such as a begin token.
        num_top: how many likely tokens of each.
    """
    first = max(num_context, 1)  # nothing predicts the first token of a text
    models = 2 + len(model.memories)  # base, mixture, memories
    size = max(_HELD_PROBABILITIES // (models * model.memory.config.vocab_size), 1)
    opinions: list[Opinion] = []
    gate, lmbda, counts = model.gate, model.config.lmbda, model.base_only
    model.base_only = BaseOnly()
    try:
        for start in range(first, len(ids), size):
            block = range(start, min(start + size, len(ids)))
            opinions += _opinions(model, gate, tokenizer, ids, block, num_top)
    finally:
        model.set_gate(gate)
        model.config.lmbda = lmbda
        model.base_only = counts
    text = GrowingText(tokenizer, ids[:num_context])
    views = []
    for place in range(num_context, len(ids)):
        piece = text.add(ids[place])
        if place == len(ids) - 1:
            piece += text.finish()
        views.append(TokenView(text=piece, opinion=opinions[place - first] if place else None))
    return views


def _opinions(
    model: MemoryAugmentedLM,
    gate: StoredGate,
    tokenizer: Any,
    ids: Sequence[int],
    places: range,
    num_top: int,
) -> list[Opinion]:
    """On the tokens at these places of a text."""
    gates = (Constant(0.0), gate, *_one_at_a_time(len(model.memories)))
    base_TV, joint_TV, *memories_MTV = (_probabilities(model, each, ids, places) for each in gates)
    return [
        _opinion(tokenizer, ids[place], base_V, memories_MV, joint_V, num_top)
        for place, base_V, joint_V, *memories_MV in zip(places, base_TV, joint_TV, *memories_MTV, strict=True)
    ]


def _one_at_a_time(num_memories: int) -> list[StoredGate]:
    if num_memories == 1:
        return [Constant(1.0)]
    return [Weights(tuple(row)) for row in np.eye(num_memories).tolist()]


def _probabilities(
    model: MemoryAugmentedLM, gate: StoredGate, ids: Sequence[int], places: range
) -> np.ndarray:
    """p of every token at these places of a text, float64 [T, V]."""
    model.set_gate(gate)
    before = torch.arange(places.start - 1, places.stop - 1, device=model.device)
    ids_BS = torch.tensor([list(ids)], device=model.device)
    logits_BTV = model(ids_BS, use_cache=False, logits_to_keep=before).logits
    probabilities_TV: np.ndarray = torch.softmax(logits_BTV[0].double(), dim=-1).cpu().numpy()
    return probabilities_TV


def _opinion(
    tokenizer: Any,
    token: int,
    base_V: np.ndarray,
    memories_MV: Sequence[np.ndarray],
    joint_V: np.ndarray,
    num_top: int,
) -> Opinion:
    weights_M = mixture_weights(base_V, memories_MV, joint_V)
    total = float(weights_M.sum())
    shares_M = weights_M / total if total > 0 else np.full(len(weights_M), 1 / len(weights_M))
    memory_V = shares_M @ np.stack(memories_MV)
    return Opinion(
        base=float(base_V[token]),
        memory=float(memory_V[token]),
        joint=float(joint_V[token]),
        weight=total,
        base_is_right=bool(base_V.argmax() == token),
        memory_is_right=bool(memory_V.argmax() == token),
        base_top=_top(tokenizer, base_V, num_top),
        memory_top=_top(tokenizer, memory_V, num_top),
    )


def mixture_weights(base_V: np.ndarray, memories_MV: Sequence[np.ndarray], joint_V: np.ndarray) -> np.ndarray:
    """λ of each memory, float64 [M] in [0, 1]; 0 for one that says what the base says."""
    differences_VM = np.stack([memory_V - base_V for memory_V in memories_MV], axis=1)
    found_M = np.linalg.lstsq(differences_VM, joint_V - base_V, rcond=1e-6)[0]
    weights_M: np.ndarray = np.clip(found_M, 0.0, 1.0)
    return weights_M


def _top(tokenizer: Any, probabilities_V: np.ndarray, num_top: int) -> tuple[Candidate, ...]:
    best = np.argsort(-probabilities_V, kind="stable")[:num_top]
    return tuple(
        Candidate(text=str(tokenizer.decode([int(token)])), probability=float(probabilities_V[token]))
        for token in best
    )
