"""States of the tokens so far, kept next to the keys and values of an engine's cache.

An engine cuts its cache into *slots*, one for each token that it holds, and says for each request which slots
are its own. What is kept by slot follows a text through cached prefixes, prompts in chunks, preemption and
reuse of blocks, as its keys and values do.

Shapes: T tokens of a step, R requests, B blocks of a request, C numbers of a slot.
"""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """The tokens of a step, of one request after the other: of each the next few of its text."""

    ends: torch.Tensor
    """[R + 1], from 0: where in the step the tokens of each request end"""
    lengths: torch.Tensor
    """[R]: tokens of each request's text, those of the step included"""
    slots: torch.Tensor
    """[T or more]: where the states of each token are kept; below 0: nowhere"""
    blocks: torch.Tensor
    """[R, B]: the blocks of slots that each request has, in the order of its text"""
    block_size: int
    """slots of a block"""
    num_tokens: int
    """T"""

    @cached_property
    def requests(self) -> torch.Tensor:
        """[T]: the request of each token, by its number."""
        places_T = torch.arange(self.num_tokens, dtype=self.ends.dtype, device=self.ends.device)
        found_T = torch.searchsorted(self.ends[1:].contiguous(), places_T, right=True)
        return found_T.clamp_max(len(self.ends) - 2)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """[T]: how many tokens of the same request stand before each in the step."""
        return torch.arange(self.num_tokens, device=self.ends.device) - self.ends[self.requests]

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T]: of each token in its text, from 0."""
        before_R = self.lengths - (self.ends[1:] - self.ends[:-1])
        return before_R[self.requests] + self.offsets

    def slots_before(self, steps: int) -> torch.Tensor:
        """[T]: the slot of the token so many positions before each in its text; below 0: there is none."""
        places_T = self.positions - steps
        numbers_T = (places_T.clamp_min(0) // self.block_size).clamp_max(self.blocks.shape[1] - 1)
        slots_T = self.blocks[self.requests, numbers_T].long() * self.block_size
        return torch.where(places_T < 0, -1, slots_T + places_T % self.block_size)


class SlotStates:
    """A cache [blocks, slots of a block, C] of any strides, read and written by slot."""

    def __init__(self, cache: torch.Tensor) -> None:
        self._cache = cache

    def write(self, slots: torch.Tensor, values: torch.Tensor, *, start: int = 0) -> None:
        """Keep values [T, ≤ C] in the columns from `start` of their slots [T].

        Where a slot is below 0 they go to the first one, which is in a block that no request has.
        """
        block, place = self._place(slots)
        self._cache[block, place, start : start + values.shape[-1]] = values

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """[T, C]; zeros where a slot is below 0."""
        block, place = self._place(slots)
        return torch.where(slots[:, None] < 0, 0, self._cache[block, place])

    def _place(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slots, block_size = slots.clamp_min(0), self._cache.shape[1]
        return slots // block_size, slots % block_size
