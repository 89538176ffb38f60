"""Part of `run_lm_eval`: how likely texts are after a context, at every λ of a grid, from one forward pass.

Base and memory read the context once, and its cache serves all continuations; of a model without a cache of
keys and values each continuation is read behind the whole context. What the two say of the tokens is mixed
afterwards, for each λ. A gate that is no number is asked in a pass of its own.

Shapes: B rows, S tokens, K positions that are predicted, T tokens of a continuation, V vocabulary, G weights
of the grid.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import cache_utils

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.finite_scores import check_distributions
from mlpmem_ds.engines.lm_eval import encode_pair
from mlpmem_ds.models.carried_layers import CarriedLayer
from mlpmem_ds.models.mixture import NOTHING, GateInputs, Grid, StoredGate, log_mixture
from mlpmem_ds.stages.questions.answering import Answerer, cut_ids
from mlpmem_ds.stages.questions.lengths import too_long

GATE_NAME = "gate"


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How base and memory are mixed: by the weights of a grid, or (a gate) as the model does by itself."""

    lambdas: tuple[float, ...] = (0.0,)
    gate: StoredGate | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the scores that it gives, in their order."""
        return (*(f"{value:g}" for value in self.lambdas), *(() if self.gate is None else (GATE_NAME,)))


@dataclass(frozen=True, kw_only=True)
class GridScore:
    """Of a continuation, for each of the weighting's names: its natural log-probability, and whether each of
    its tokens is the likeliest one (false where that was not asked for)."""

    log_probabilities: tuple[float, ...]
    is_greedy: tuple[bool, ...]
    is_cut: bool
    """whether the context lost its beginning"""


@torch.no_grad()
def score_continuations(
    answerer: Answerer,
    context: str,
    continuations: Sequence[str],
    weighting: Weighting,
    *,
    with_greedy: bool = False,
) -> list[GridScore]:
    """The scores of each continuation of a context, by the harness's convention of tokens.

    Args:
        answerer: base and memory in one, or a model without a memory, for which all weights are the same.
        context: loses its beginning where the model reads too few tokens for it and the longest continuation.
        continuations: texts, with the blank before them.
        weighting: of base and memory.
        with_greedy: also look for the likeliest tokens, which takes the whole vocabulary for each weight.

    Raises:
        UserError: a continuation is longer than the model reads, or base or memory says what is no number.
    """
    pairs = [encode_pair(answerer.encoder, context, text) for text in continuations]
    afters = [after for _, after in pairs]
    room = answerer.context - max(map(len, afters))
    if room <= len(answerer.encoder.begin_ids):
        raise UserError(too_long(max(map(len, afters)), answerer.context))
    before = cut_ids(pairs[0][0], room, answerer.encoder)
    model = answerer.model
    passes: list[tuple[tuple[float, ...], list[_Opinion]]] = []
    shown = _Shown() if hasattr(model, "set_gate") else None
    with mixed_by(model, shown, threshold=None):
        passes.append((weighting.lambdas, _Reading(model, shown).opinions(before, afters)))
    if weighting.gate is not None:
        with mixed_by(model, weighting.gate, threshold=model.base_only_threshold):
            passes.append(((0.0,), _Reading(model, None).opinions(before, afters)))
    scores = []
    for number, after in enumerate(afters):
        logs: list[float] = []
        greedy: list[bool] = []
        for lambdas, opinions in passes:
            found = _mixed(opinions[number], after, lambdas, with_greedy)
            logs += found[0]
            greedy += found[1]
        is_cut = len(pairs[0][0]) > room
        scores.append(GridScore(log_probabilities=tuple(logs), is_greedy=tuple(greedy), is_cut=is_cut))
    return scores


_Opinion = tuple[torch.Tensor, torch.Tensor | None]
"""log-probabilities float32 [T, V] of the base, and of the memory if there is one"""


def _mixed(
    opinion: _Opinion, after: Sequence[int], lambdas: Sequence[float], with_greedy: bool
) -> tuple[list[float], list[bool]]:
    """(log-probability of the tokens, whether each is the likeliest), for each λ."""
    base_TV, memory_TV = opinion
    ids_T = torch.tensor(after, device=base_TV.device)
    base_T = base_TV.gather(1, ids_T[:, None])[:, 0]
    if memory_TV is None:
        logs = [float(base_T.double().sum())] * len(lambdas)
        is_greedy = with_greedy and bool((base_TV.argmax(-1) == ids_T).all())
        return logs, [is_greedy] * len(lambdas)
    memory_T = memory_TV.gather(1, ids_T[:, None])[:, 0]
    weights_G1 = Grid(tuple(lambdas))().to(base_TV.device)
    logs_GT = log_mixture(base_T.double(), memory_T.double(), weights_G1)
    greedy = [
        with_greedy and bool((log_mixture(base_TV, memory_TV, weight).argmax(-1) == ids_T).all())
        for weight in lambdas
    ]
    return logs_GT.sum(-1).tolist(), greedy


class _Reading:
    """One pass over a context and its continuations.

    Args:
        model: a causal language model, or base and memory in one.
        shown: where base and memory leave their logits; None: the model's own are taken.
    """

    def __init__(self, model: Any, shown: _Shown | None) -> None:
        self._model, self._shown = model, shown
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def opinions(self, before: list[int], afters: Sequence[list[int]]) -> list[_Opinion]:
        """Of each continuation."""
        longest = max(map(len, afters))
        (first_KV, memory_KV), cache = self._forward([before], None, 1)
        if longest == 1:
            return [(first_KV[0], _row(memory_KV, 0))] * len(afters)
        if not _serves_continuations(cache):
            return [self._whole(before, after) for after in afters]
        if len(afters) > 1:
            cache.batch_repeat_interleave(len(afters))
        # What follows a shorter continuation stands behind all that it is scored on.
        rows = [after[:-1] + after[-1:] * (longest - len(after)) for after in afters]
        (rest_BKV, rest_memory_BKV), _ = self._forward(rows, cache, longest - 1)
        found = []
        for number, after in enumerate(afters):
            keep = slice(0, len(after) - 1)
            base = torch.cat([first_KV[0], rest_BKV[number, keep]])
            memory = None
            if memory_KV is not None and rest_memory_BKV is not None:
                memory = torch.cat([memory_KV[0], rest_memory_BKV[number, keep]])
            found.append((base, memory))
        return found

    def _whole(self, before: list[int], after: list[int]) -> _Opinion:
        """Of a continuation that is read behind the whole context."""
        (base_KV, memory_KV), _ = self._forward([before + after[:-1]], None, len(after))
        return base_KV[0], _row(memory_KV, 0)

    def _forward(
        self, rows: list[list[int]], cache: Any, keep: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], Any]:
        """Log-probabilities [B, K, V] of base and memory at the last `keep` positions, and the cache."""
        arguments: dict[str, Any] = {"input_ids": torch.tensor(rows, device=self._model.device)}
        arguments |= {"use_cache": True, **({"logits_to_keep": keep} if self._keeps else {})}
        output = self._model(**arguments, **({} if cache is None else {"past_key_values": cache}))
        base = output.logits[:, -keep:]
        memories: tuple[torch.Tensor, ...] = ()
        if self._shown is not None:
            assert self._shown.inputs.base_logits is not None
            base, memories = self._shown.inputs.base_logits, tuple(self._shown.inputs.memory_logits)
        base_BKV = torch.log_softmax(base.float(), -1)
        check_distributions(base_BKV, of="the base" if memories else "the model")
        memory = None
        if memories:  # those of a bank share the weight equally
            logs = torch.stack([torch.log_softmax(each.float(), -1).to(base.device) for each in memories])
            check_distributions(logs, of="a memory")
            memory = torch.logsumexp(logs, dim=0) - math.log(len(memories))
        return (base_BKV, memory), output.get("past_key_values")


# `DummyLayer`, which older versions lack, holds nothing itself; what a joint model carries is one.
_KEYS_AND_VALUES = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
_WITHOUT_KEYS: type = getattr(cache_utils, "DummyLayer", CarriedLayer)


def _serves_continuations(cache: Any) -> bool:
    """Whether several continuations can go on from a cache: it has keys and values, and what a joint model
    carries with them, alone.

    States of linear attention, convolutions and recurrences are not repeated for several continuations, and
    some models (Jamba, MiniMax) read them for one new token at a time alone: for more they begin anew,
    without a word. Others give a cache of another name (Mamba, RWKV), or none (RecurrentGemma).
    """
    return type(cache) is cache_utils.DynamicCache and all(
        type(layer) in _KEYS_AND_VALUES or isinstance(layer, _WITHOUT_KEYS) for layer in cache.layers
    )


def _row(values: torch.Tensor | None, number: int) -> torch.Tensor | None:
    return None if values is None else values[number]


class _Shown:
    """A gate that keeps what it is shown; its weight is 0."""

    reads: ClassVar[Mapping[str, Any]] = {}
    history: ClassVar[None] = None

    def __init__(self) -> None:
        self.inputs = NOTHING

    def __call__(self, inputs: GateInputs = NOTHING, /) -> float:
        self.inputs = inputs
        return 0.0

    def settings(self) -> dict[str, Any]:
        return {"kind": "constant"}

    def __str__(self) -> str:
        return "shown"


@contextlib.contextmanager
def mixed_by(model: Any, gate: StoredGate | None, *, threshold: float | None) -> Iterator[None]:
    """Let base and memory have this gate and threshold for a while; None: a model without a memory."""
    if gate is None:
        yield
        return
    own, lmbda, own_threshold = model.gate, model.config.lmbda, model.base_only_threshold
    try:
        model.set_gate(gate)
        model.base_only_threshold = threshold
        yield
    finally:
        model.set_gate(own)
        model.config.lmbda, model.base_only_threshold = lmbda, own_threshold
