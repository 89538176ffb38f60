"""The logits of the rows that an engine sampled from last, for the history of a gate.

A history needs what base and memories gave the token that followed. In decoding an engine has computed that a
moment before, to sample from it: it is kept until the next step, so that no head and no memory runs twice.
What is kept is found by the slot of its token, and taken where the row is the same, bit by bit: logits are
made of a row alone, so that it does not matter in which order an engine has its requests.

Shapes: R rows that were sampled from, T tokens of a step, W width of a row, V vocabulary, P models (the base,
then the memories).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mlpmem_ds.models.history_cache import token_log_probabilities

_BYTES = 1 << 28
"""of logits that are kept; those of further rows are made again"""
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, kw_only=True)
class _Kept:
    slots_R: torch.Tensor
    bits_RW: torch.Tensor
    logits: tuple[torch.Tensor, ...]  # P tensors [R, V]


class KeptLogits:
    """Of one step, until the next one has read them."""

    def __init__(self) -> None:
        self._slots_R: torch.Tensor | None = None
        self._kept: _Kept | None = None

    def expect(self, slots_R: torch.Tensor) -> None:
        """The slots of the rows that will be sampled from in this step, or of more; in their order."""
        self._slots_R, self._kept = slots_R, None

    def keep(self, rows_RW: torch.Tensor, logits: Sequence[torch.Tensor]) -> None:
        """The rows of this step and their logits, P tensors [R, V]. Only the first call of a step counts:
        what follows is of rows that `expect` does not know."""
        slots_R, self._slots_R = self._slots_R, None
        if slots_R is None or len(slots_R) < len(rows_RW):
            return
        row_bytes = sum(each.shape[-1] * each.element_size() for each in logits)
        count = min(len(rows_RW), _BYTES // row_bytes)
        self._kept = _Kept(
            slots_R=slots_R[:count],
            bits_RW=_bits(rows_RW[:count]),
            logits=tuple(each[:count] for each in logits),
        )

    def places(self, slots_T: torch.Tensor, rows_TW: torch.Tensor) -> torch.Tensor:
        """Where the logits of these rows are among those that are kept, [T]; -1: they are not."""
        latest = self._kept
        if latest is None or not len(latest.slots_R):
            return torch.full_like(slots_T, -1)
        is_same_TR = (slots_T[:, None] == latest.slots_R) & (slots_T >= 0)[:, None]
        places_T = is_same_TR.int().argmax(dim=1)
        is_kept_T = is_same_TR.any(dim=1) & (latest.bits_RW[places_T] == _bits(rows_TW)).all(dim=1)
        return torch.where(is_kept_T, places_T, -1)

    def log_probabilities(self, places_T: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
        """log p of the tokens by each model at these places, float32 [T, P]."""
        assert self._kept is not None

        def of(logits_RV: torch.Tensor) -> torch.Tensor:
            def block(start: int, stop: int) -> torch.Tensor:
                return logits_RV[places_T[start:stop]][None]

            return token_log_probabilities(block, ids_T[None])[0]

        return torch.stack([of(each) for each in self._kept.logits], dim=-1)


def _bits(rows: torch.Tensor) -> torch.Tensor:
    """The numbers as whole ones: a history in 16 bits may look like NaN, which equals nothing."""
    return rows.contiguous().view(_BITS[rows.element_size()])
