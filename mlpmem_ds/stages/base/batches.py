"""Part of `train_base`: the train split cut into sequences, and dealt to steps, ranks and micro-batches.

S tokens of a sequence that are predicted, P begin tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from mlpmem_ds.core.hashing import Permutation, hash_fraction, shuffled
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.mapped_tokens import MappedTokens


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The train split cut into sequences of S + 1 tokens, S apart; where the first starts changes with the
    epoch. `begin` stands before each, as before a document."""

    tokens: np.ndarray | MappedTokens
    length: int
    seed: int
    begin: tuple[int, ...] = ()

    @property
    def per_epoch(self) -> int:
        return (len(self.tokens) - self.length) // self.length

    def batch(self, epoch: int, first: int, count: int, *, rank: int = 0, size: int = 1) -> np.ndarray:
        """int64 [n, P + S + 1]: of the sequences [first, first + count) of the epoch's order those of a rank,
        every size-th; P begin tokens before each."""
        offset = int(shuffled(self.length, self.seed, epoch, 1)[0])
        chosen = _order(self.per_epoch, self.seed, epoch).items(first, first + count)[rank::size]
        last = len(self.tokens) - self.length - 1
        starts = np.minimum(offset + chosen * self.length, last)
        if not self.begin:
            return self.tokens[starts[:, None] + np.arange(self.length + 1)]
        # One that starts with a document starts behind its begin tokens, which are there once.
        first_tokens = self.tokens[starts[:, None] + np.arange(len(self.begin))]
        is_document = (np.where(first_tokens < 0, ~first_tokens, first_tokens) == self.begin).all(axis=1)
        starts = np.minimum(starts + len(self.begin) * is_document, last)
        sequences = self.tokens[starts[:, None] + np.arange(self.length + 1)]
        return np.concatenate([np.tile(self.begin, (len(chosen), 1)), sequences], axis=1)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Permutation:
    """Of an epoch's sequences; made once an epoch, not once a step."""
    return Permutation(count, seed, epoch, 0)


@dataclass(frozen=True, kw_only=True)
class SequenceBatches:
    """This rank's sequences of each step (`stages.training.parts.Batches`).

    What is left of an epoch and fills no batch is left out.
    """

    sequences: Sequences
    per_step: int
    """sequences of a step, over all ranks"""
    num_micro_batches: int
    world: World
    may_run_ahead = False  # each batch sets the seed of its step's dropout

    @property
    def steps_per_epoch(self) -> int:
        return self.sequences.per_epoch // self.per_step

    def stream(self, first: int, stop: int) -> Iterator[tuple[tuple[torch.Tensor, ...], float]]:
        """Micro-batches are int64 [sequences, P + S + 1]."""
        rank, size = self.world.rank, self.world.size
        for step in range(first, stop):
            start = time.perf_counter()
            # Dropout as in a run that was never stopped.
            torch.manual_seed(int(hash_fraction(f"{step}:{rank}", self.sequences.seed) * 2**63))
            epoch, batch = divmod(step, self.steps_per_epoch)
            start_of_step = batch * self.per_step
            mine = self.sequences.batch(epoch, start_of_step, self.per_step, rank=rank, size=size)
            yield torch.from_numpy(mine).chunk(self.num_micro_batches), time.perf_counter() - start

    def state_after(self, step: int) -> None:
        """None: a batch is a function of its number."""

    def continue_from(self, state: None) -> None:
        """Nothing to go on from."""

    def faulty_positions(self, step: int) -> list[int]:
        """None: tokens are whole numbers."""
        return []
