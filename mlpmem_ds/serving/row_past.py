"""What a row carries of the tokens before: states for memories with a window, the history of a gate.

An engine gives the states of the tokens of a step, which may be a part of a text. Each token's own part of
its row, and the history up to it, is kept by slot (`slot_states`); the next step reads it there. A history
needs what base and memories said about the tokens that followed: their heads run on the rows of the positions
before, so that the tokens of a prompt count too, but where the step before has sampled from that row and its
logits are kept (`kept_logits`).

Shapes: T tokens of a step, T' ≥ T rows that an engine pads to, O numbers of an own part, W width of a row, P
models (the base, then the memories), H numbers of a history, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from mlpmem_ds.models.gate_features import History
from mlpmem_ds.models.history_cache import token_log_probabilities
from mlpmem_ds.serving.kept_logits import KeptLogits
from mlpmem_ds.serving.row_layout import RowLayout
from mlpmem_ds.serving.slot_states import Chunks, SlotStates

LogitsOf = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
"""(last state [..., D], states by name) -> logits [..., V]"""


@dataclass(frozen=True, kw_only=True)
class RowPast:
    """Extends the own parts of a step's rows by what they carry of the tokens before."""

    layout: RowLayout
    history: History | None
    models: Sequence[LogitsOf]
    """the base, then the memories"""
    sampled: KeptLogits | None = None
    """of the rows that were sampled from last; None: the heads run again"""

    def slot_width(self, dtype: torch.dtype) -> int:
        """Numbers of a slot: an own part, and a history. Fewer are used where the last state is narrower than
        the others."""
        return self.layout.own_width + self.layout.history_width(dtype)

    def begin(self, own_TO: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows [T', W] as if each token were the first of a text, for an engine that measures itself.

        The heads run as they will later, so that the memory that they need is measured too.
        """
        width = self.layout.past * own_TO.shape[-1] + self.layout.history_width(own_TO.dtype)
        rows_TW = functional.pad(own_TO, (0, width))
        if self.history is not None:
            self._log_probabilities(rows_TW, ids_T)
        return rows_TW

    def extend(
        self, own_TO: torch.Tensor, ids_T: torch.Tensor, chunks: Chunks, cache: SlotStates
    ) -> torch.Tensor:
        """The rows [T', W] of a step, whose last T' - T are padding; and what later steps need is kept.

        Args:
            own_TO: own parts [T', O].
            ids_T: the tokens [T'].
            chunks: which tokens are whose.
            cache: what the steps before kept.
        """
        count, own_width = chunks.num_tokens, own_TO.shape[-1]
        slots_T = chunks.slots[:count]
        cache.write(slots_T, own_TO[:count])
        num_steps = self.layout.past + (self.history is not None)
        earlier = [cache.read(chunks.slots_before(steps)) for steps in range(1, num_steps + 1)]
        own = [each[:, :own_width] for each in earlier]
        carried = own[: self.layout.past]
        if self.history is not None:
            packed_before_TC = earlier[0][:, own_width:][:, : self.layout.history_width(own_TO.dtype)]
            before_TW = torch.cat([*own, packed_before_TC], dim=-1)
            history_TH = self._follow(self.history, before_TW, ids_T[:count], chunks)
            packed_TC = self.layout.pack(history_TH, own_TO.dtype)
            cache.write(slots_T, packed_TC, start=own_width)
            carried.append(packed_TC)
            if self.sampled is not None:
                self.sampled.expect(chunks.slots[(chunks.ends[1:] - 1).clamp_min(0).long()])
        carried_TC = torch.cat(carried, dim=-1)
        return torch.cat([own_TO, functional.pad(carried_TC, (0, 0, 0, len(own_TO) - count))], dim=-1)

    def _follow(
        self, history: History, before_TW: torch.Tensor, ids_T: torch.Tensor, chunks: Chunks
    ) -> torch.Tensor:
        """The history [T, H] at each token, that token included, from the rows of the tokens before. Only
        for the first token of each request is the history in that row known yet."""
        log_TP = self._of_next(before_TW, ids_T, chunks)
        log_base_T, log_memories_TM = log_TP[:, 0], log_TP[:, 1:]
        in_step_TH, _ = history.along(log_base_T, log_memories_TM, segments=chunks.requests)
        start_TH = self.layout.split(before_TW)[2]
        assert start_TH is not None
        firsts_T = torch.arange(len(ids_T), device=ids_T.device) - chunks.offsets
        remaining_TH = history.remaining(start_TH[firsts_T], chunks.offsets + 1)
        return history.update(in_step_TH, log_base_T, log_memories_TM) + remaining_TH

    def _of_next(self, before_TW: torch.Tensor, ids_T: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """log p of each token by each model at the one before, float32 [T, P]; 0 for a text's first."""
        is_followed_T = chunks.positions > 0
        if self.sampled is None:
            return torch.where(is_followed_T[:, None], self._log_probabilities(before_TW, ids_T), 0.0)
        # The row before is one of an earlier step for these alone.
        firsts = torch.nonzero(is_followed_T & (chunks.offsets == 0))[:, 0]
        places = self.sampled.places(chunks.slots_before(1)[firsts], before_TW[firsts])
        taken, places = firsts[places >= 0], places[places >= 0]
        is_made_T = is_followed_T.clone()
        is_made_T[taken] = False
        made = torch.nonzero(is_made_T)[:, 0]
        log_TP = torch.zeros((len(ids_T), len(self.models)), device=before_TW.device)
        if len(taken):
            log_TP[taken] = self.sampled.log_probabilities(places, ids_T[taken])
        if len(made):
            log_TP[made] = self._log_probabilities(before_TW[made], ids_T[made])
        return log_TP

    def _log_probabilities(self, rows_TW: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
        """log p of each row's next token by each model, float32 [T, P]; of a part of the rows at once."""

        def of(model: LogitsOf) -> torch.Tensor:
            def block(start: int, stop: int) -> torch.Tensor:
                final, states, _ = self.layout.split(rows_TW[start:stop])
                return model(final, states)[None]

            return token_log_probabilities(block, ids_T[None])[0]

        return torch.stack([of(model) for model in self.models], dim=-1)
