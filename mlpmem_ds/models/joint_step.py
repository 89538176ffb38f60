"""From one forward of the base to the mixture: the memories run, a gate weighs them, some are left out.

Place in the pipeline: the joint model (`hf`) makes a `Step` in each forward, from its parts.

**Base only.** With a threshold, a weight below it is 0. A memory need not run where its weight will be 0, but
the gate also reads what the memory says. So the gate is asked before, with NaN for all that only a memory
could tell, which a learned gate takes for the average: where this *foreseen* weight is below the threshold,
the memory is left out. A memory that did not run counts in the history as one that said what the base says,
so that the averages go back to 0 and it is tried again.

This file travels with exported models as remote code: it imports torch and the standard library only.

Shapes: B sequences, S tokens, K kept positions, D width of the base, H numbers of a history, V vocabulary, M
memories, P models (the base, then the memories), T positions of a crop, R rows that a memory runs on, `...` B
and K, or one dimension for both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .carried_layers import last_of, num_followed
from .gate_features import confidences, confidences_of, num_confidences
from .history_cache import HistoryLayer, states_of, token_log_probabilities
from .joint_parts import input_name, kept_positions
from .memory import Memory
from .mixture import (
    GateInputs,
    StoredGate,
    check_rows,
    log_mixture,
    log_mixture_of_bank,
    log_mixture_of_bank_logits,
    log_mixture_of_logits,
)
from .shared_head import SharedHead

Mixture = Callable[[torch.Tensor, torch.Tensor, float | torch.Tensor], torch.Tensor]
States = Mapping[str, torch.Tensor]


@dataclass(kw_only=True)
class BaseOnly:
    """How often memories were left out; compiled steps are not counted.

    A row is one position of one memory, a run one memory in one forward, of one or more rows.
    """

    rows: int = 0
    skipped_rows: int = 0
    runs: int = 0
    skipped_runs: int = 0
    flops: float = 0.0
    """of the rows that were skipped, 2 for each weight of a matrix"""
    bytes: int = 0
    """of the weights that the skipped runs did not read"""

    def add(self, memory: Memory, num_rows: int, num_skipped: int) -> None:
        """Count one memory in one forward."""
        self.rows += num_rows
        self.skipped_rows += num_skipped
        self.runs += 1
        self.flops += 2.0 * num_skipped * memory.config.num_matrix_parameters()
        if num_skipped == num_rows:
            self.skipped_runs += 1
            shared = [memory.head.weight] if isinstance(memory.head, SharedHead) else []
            self.bytes += sum(
                values.numel() * values.element_size()
                for values in (*memory.parameters(), *memory.buffers(), *shared)
            )

    def __str__(self) -> str:
        share = self.skipped_rows / max(self.rows, 1)
        return (
            f"the memory was left out at {self.skipped_rows:,} of {self.rows:,} positions ({share:.0%}),"
            f" which saved {self.flops / 1e9:,.3g} GFLOP; {self.skipped_runs:,} of {self.runs:,} runs were"
            f" not made, which saved reading {self.bytes / 1e9:,.3g} GB of weights"
        )


@dataclass(frozen=True, kw_only=True)
class Said:
    """What P models gave at some positions: logits `[..., V]`, and their log-probabilities, float32, where
    these were made (else none)."""

    logits: tuple[torch.Tensor, ...]
    log_probabilities: tuple[torch.Tensor, ...] = ()

    def last(self, count: int) -> tuple[torch.Tensor, ...]:
        """The log-probabilities of the last T positions, float32 `[B, T, V]`."""
        if self.log_probabilities:
            return tuple(last_of(each, count) for each in self.log_probabilities)
        # Of a memory that was left out everywhere these are the base's own: made once.
        parts = {id(each): each[:, each.shape[1] - count :] for each in self.logits}
        made = {key: torch.log_softmax(part.float(), dim=-1) for key, part in parts.items()}
        return tuple(made[id(each)] for each in self.logits)


@dataclass(frozen=True, kw_only=True)
class Tail:
    """What the cache carries to the next call: histories `[B, T, H]`, P log-probabilities `[B, T, V]`, no
    padding `[B, T]`."""

    states: torch.Tensor
    log_probabilities: tuple[torch.Tensor, ...]
    is_real: torch.Tensor

    def write_to(self, layer: HistoryLayer) -> None:
        layer.write(self.states, self.log_probabilities, self.is_real)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The parts of a joint model, in one forward."""

    memories: Sequence[Memory]
    gate: StoredGate
    mixture: Mixture
    threshold: float | torch.Tensor | None
    """a number, or one for each row [..., 1]; None: no memory is left out"""
    base_only: BaseOnly = field(default_factory=BaseOnly)

    def mix(
        self, base_logits: torch.Tensor, states: States, history: torch.Tensor | None = None
    ) -> torch.Tensor:
        """float32 logits of the mixture [..., V]: its log-probabilities, and in each row the log-sum-exp of
        the base's logits, so that they become the base's as the weight does 0.

        Args:
            base_logits: [..., V].
            states: of the base [..., D], by the names of the memories' inputs and of the gate's.
            history: [..., H], for a gate with one.
        """
        return self.mix_with_parts(base_logits, states, history)[0]

    def mix_with_parts(
        self, base_logits: torch.Tensor, states: States, history: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The same, and the logits [..., V] of the base and of each memory; those of a memory are the base's
        where it was left out."""
        mixed, said = self._mix(GateInputs(base_logits=base_logits, states=states, history=history), ran=None)
        return mixed, said.logits

    def logits_of_memory(self, number: int, states: States) -> torch.Tensor:
        """[..., V] of one memory, from 0, which is not left out anywhere."""
        return self._logits(self.memories[number], self._hidden(number, states))

    def mix_and_follow(
        self,
        base_logits_BSV: torch.Tensor,
        states: States,
        ids_BS: torch.Tensor,
        is_real_BS: torch.Tensor,
        before: HistoryLayer | None,
        logits_to_keep: int | torch.Tensor,
    ) -> tuple[torch.Tensor, Tail]:
        """The same at the kept positions, for a gate with a history; and what the next call continues from.

        Args:
            base_logits_BSV, states: at all new positions.
            ids_BS, is_real_BS: the new tokens, and which are no padding.
            before: what the calls before left; None or empty at the beginning.
        """
        assert self.gate.history is not None
        num_tokens = ids_BS.shape[1]
        keep = partial(kept_positions, logits_to_keep=logits_to_keep)
        is_next = num_tokens == 1 and before is not None and before.states is not None
        hidden: Sequence[torch.Tensor] = ()
        ran: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None
        followed_BSP = base_logits_BSV.new_zeros(
            (len(ids_BS), 0, 1 + len(self.memories)), dtype=torch.float32
        )
        if not is_next:
            hidden = [self._hidden(number, states) for number in range(len(self.memories))]
            rows = zip(self.memories, map(keep, hidden), strict=True)
            ran = [(self._logits(memory, each), each) for memory, each in rows]
            is_whole = isinstance(logits_to_keep, int) and not 0 < logits_to_keep < num_tokens
            whole_logits = [logits for logits, _ in ran] if is_whole else None
            followed_BSP = self._followed(base_logits_BSV, hidden, ids_BS, whole_logits)
        device = base_logits_BSV.device
        is_real_BS = is_real_BS.to(device)
        history_BSH = states_of(before, self.gate.history, followed_BSP, ids_BS.to(device), is_real_BS)
        evidence = GateInputs(
            base_logits=keep(base_logits_BSV),
            states={name: keep(state_BSD) for name, state_BSD in states.items()},
            history=keep(history_BSH),
        )
        logits, said = self._mix(evidence, ran)
        count = num_followed(num_tokens, logits_to_keep)
        if not isinstance(logits_to_keep, int) and not is_next:
            last = [
                self._logits(memory, each[:, -1:]) for memory, each in zip(self.memories, hidden, strict=True)
            ]
            said = Said(logits=(base_logits_BSV[:, -1:], *last))
        return logits, Tail(
            states=last_of(history_BSH, count),
            log_probabilities=said.last(count),
            is_real=last_of(is_real_BS, count),
        )

    def _followed(
        self,
        base_logits_BSV: torch.Tensor,
        hidden: Sequence[torch.Tensor],
        ids_BS: torch.Tensor,
        memory_logits: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        """log p of the tokens after the first, by each model at the position before: [B, S - 1, P].

        `memory_logits` are those of all positions, if they were made; else a head runs on some positions
        at once.
        """
        next_ids_BS = ids_BS[:, 1:]
        if memory_logits is None:
            memory_blocks = [partial(self._block, *each) for each in zip(self.memories, hidden, strict=True)]
        else:
            memory_blocks = [partial(_rows, each) for each in memory_logits]
        logits_of = [partial(_rows, base_logits_BSV), *memory_blocks]
        each_BS = [token_log_probabilities(of, next_ids_BS).to(base_logits_BSV.device) for of in logits_of]
        return torch.stack(each_BS, dim=-1)

    def _block(self, memory: Memory, hidden_BSH: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return self._logits(memory, hidden_BSH[:, start:stop])

    def _hidden(self, number: int, states: States, rows: torch.Tensor | None = None) -> torch.Tensor:
        memory, inputs = self.memories[number], states[input_name(number)]
        hidden: torch.Tensor = memory(memory.cast(inputs if rows is None else inputs[rows]))
        return hidden

    @staticmethod
    def _logits(memory: Memory, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = memory.head(hidden)
        return logits

    def _mix(
        self, evidence: GateInputs, ran: Sequence[tuple[torch.Tensor, torch.Tensor]] | None
    ) -> tuple[torch.Tensor, Said]:
        """The mixture's logits, and what base and memories gave (the base's where a memory was left out).

        `evidence` holds what is known before the memories run; `ran` of each its logits and what its head
        read, if it ran.
        """
        base_logits = evidence.base_logits
        assert base_logits is not None
        skips = self._foresee(evidence)  # [..., M], or None
        if ran is None:
            if skips is not None and not torch.compiler.is_compiling():
                self._count(skips)
                if bool(skips.all()):
                    return base_logits.float(), Said(logits=(base_logits,) * (1 + len(self.memories)))
            ran = [
                self._run(number, evidence.states, base_logits, None if skips is None else skips[..., number])
                for number in range(len(self.memories))
            ]
        memory_logits = [logits.to(base_logits.device) for logits, _ in ran]
        hidden = [state for _, state in ran]
        said = Said(
            logits=(base_logits, *memory_logits),
            log_probabilities=self._log_probabilities(base_logits, memory_logits),
        )
        inputs = replace(
            evidence,
            memory_logits=said.logits[1:],
            memory_states=tuple(hidden),
            confidences=confidences_of(said.log_probabilities) if said.log_probabilities else None,
        )
        if skips is not None:  # also where the memories ran: a step, in which they do not, weighs the same
            values = inputs.confidences
            if values is None:
                values = confidences(base_logits, memory_logits)
            inputs = replace(
                inputs,
                confidences=_unknown_where(skips, values),
                memory_states=tuple(
                    torch.where(skip[..., None].to(state.device), torch.nan, state)
                    for skip, state in zip(skips.unbind(-1), hidden, strict=True)
                ),
            )
        log_mixture = self._mixture(said, self._cut(_weigh(self.gate, inputs), skips))
        return log_mixture + torch.logsumexp(base_logits.float(), dim=-1, keepdim=True), said

    def _log_probabilities(
        self, base_logits: torch.Tensor, memory_logits: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Of base and memories, for a learned gate and the mixture together; none where either needs none."""
        reads_logits = len(memory_logits) == 1 and self._mixture_of_one() is not log_mixture_of_logits
        if reads_logits or not isinstance(self.gate, nn.Module):
            return ()
        return tuple(torch.log_softmax(each.float(), dim=-1) for each in (base_logits, *memory_logits))

    def _run(
        self, number: int, states: States, base_logits: torch.Tensor, skip: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [..., V] and what the head read [..., H] of one memory; where it is skipped the base's
        logits (and what the head read is nothing to go by)."""
        memory, device = self.memories[number], base_logits.device
        if skip is None or torch.compiler.is_compiling() or not bool(skip.any()):
            hidden = self._hidden(number, states)
            logits = self._logits(memory, hidden).to(device)
            if skip is not None:
                logits = torch.where(skip[..., None], base_logits, logits)
            return logits, hidden
        if bool(skip.all()):
            width = memory.config.hidden_size
            return base_logits, base_logits.new_full((*skip.shape, width), torch.nan, dtype=torch.float32)
        rows = ~skip
        hidden_RH = self._hidden(number, states, rows.to(states[input_name(number)].device))
        logits_RV = self._logits(memory, hidden_RH).to(device)
        hidden = hidden_RH.new_full((*skip.shape, hidden_RH.shape[-1]), torch.nan)
        hidden[rows.to(hidden.device)] = hidden_RH
        logits = base_logits.to(torch.promote_types(base_logits.dtype, logits_RV.dtype), copy=True)
        logits[rows] = logits_RV.to(logits.dtype)
        return logits, hidden

    def _foresee(self, evidence: GateInputs) -> torch.Tensor | None:
        """Where each memory is left out, bool [..., M]; None: nowhere."""
        base_logits = evidence.base_logits
        if self.threshold is None or base_logits is None:
            return None
        num_memories, rows = len(self.memories), base_logits.shape[:-1]
        unknown = base_logits.new_full(
            (*rows, num_confidences(num_memories) - num_confidences(0)), torch.nan, dtype=torch.float32
        )
        inputs = replace(
            evidence,
            memory_states=tuple(
                base_logits.new_full((*rows, memory.config.hidden_size), torch.nan, dtype=torch.float32)
                for memory in self.memories
            ),
            confidences=torch.cat([confidences(base_logits, ()), unknown], dim=-1),
        )
        return _of_each(_weigh(self.gate, inputs), base_logits, num_memories) < self.threshold

    def _cut(self, lmbdas: float | torch.Tensor, skips: torch.Tensor | None) -> float | torch.Tensor:
        """The weights, 0 where they are below the threshold or foreseen to be."""
        if self.threshold is None or skips is None:
            return lmbdas
        each = _of_each(lmbdas, skips, len(self.memories))
        each = torch.where(skips | (each < self.threshold), 0.0, each)
        return each[..., 0] if len(self.memories) == 1 else each

    def _count(self, skips: torch.Tensor) -> None:
        for memory, skip in zip(self.memories, skips.unbind(-1), strict=True):
            self.base_only.add(memory, skip.numel(), int(skip.sum()))

    def _mixture(self, said: Said, lmbdas: float | torch.Tensor) -> torch.Tensor:
        base_logits, *memory_logits = said.logits
        if len(memory_logits) > 1:
            if not isinstance(lmbdas, torch.Tensor):
                lmbdas = torch.full((len(memory_logits),), lmbdas / len(memory_logits), dtype=torch.float64)
            if said.log_probabilities:
                base, *memories = said.log_probabilities
                return log_mixture_of_bank(base, memories, lmbdas)
            return log_mixture_of_bank_logits(base_logits, memory_logits, lmbdas)
        if isinstance(lmbdas, torch.Tensor) and lmbdas.shape == (1,):
            lmbdas = lmbdas.to(base_logits.device).expand(base_logits.shape[:-1])
        if said.log_probabilities:
            check_rows(base_logits, memory_logits[0], lmbdas)
            base, memory = said.log_probabilities
            return log_mixture(base, memory, lmbdas)
        return self._mixture_of_one()(base_logits, memory_logits[0], lmbdas)

    def _mixture_of_one(self) -> Mixture:
        # A compiler makes one kernel of the plain function by itself.
        return log_mixture_of_logits if torch.compiler.is_compiling() else self.mixture


def _rows(logits_BSV: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return logits_BSV[:, start:stop]


def _weigh(gate: StoredGate, inputs: GateInputs) -> float | torch.Tensor:
    """The gate's weights, on the device of the base's logits."""
    assert inputs.base_logits is not None
    home = inputs.base_logits.device
    weight = next(gate.parameters(), None) if isinstance(gate, nn.Module) else None
    if weight is not None and weight.device != home:
        inputs = _on(inputs, weight.device)
    lmbdas = gate(inputs)
    return lmbdas.to(home) if isinstance(lmbdas, torch.Tensor) else lmbdas


def _on(inputs: GateInputs, device: torch.device) -> GateInputs:
    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, Mapping):
            return {name: moved(each) for name, each in value.items()}
        return tuple(map(moved, value)) if isinstance(value, list | tuple) else value

    return GateInputs(**{name: moved(value) for name, value in vars(inputs).items()})


def _of_each(lmbdas: float | torch.Tensor, like: torch.Tensor, num_memories: int) -> torch.Tensor:
    """The weight of each memory, [..., M], at each row of `like`, [..., any], and on its device."""
    shape = (*like.shape[:-1], num_memories)
    if not isinstance(lmbdas, torch.Tensor):
        return like.new_full(shape, lmbdas / num_memories, dtype=torch.float32)
    is_of_rows = num_memories == 1 and lmbdas.shape == like.shape[:-1]
    return (lmbdas[..., None] if is_of_rows else lmbdas).to(like.device).expand(shape)


def _unknown_where(skips: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The confidences with NaN for the memories that did not run."""
    num_memories = skips.shape[-1]
    width = (num_confidences(num_memories) - num_confidences(0)) // num_memories
    base_columns = torch.zeros_like(values[..., : num_confidences(0)], dtype=torch.bool)
    unknown = torch.cat([base_columns, skips.repeat_interleave(width, dim=-1)], dim=-1)
    return torch.where(unknown, torch.nan, values)
