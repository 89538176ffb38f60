"""Part of `train`: perplexity of base, memory and their best mixture on the corpus's tuning split.

The base's log-probabilities and the memory's inputs are computed once, at the start, and held in memory; a
validation is then a forward of the memory over some thousand rows.

N rows of this rank, I input size, G grid of λ.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block, deal
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.engine import Engine
from mlpmem_ds.engines.hidden_states import StateSource, scan_positions, state_width
from mlpmem_ds.engines.processes import gather_values
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.counted_rows import CountedRows
from mlpmem_ds.maths.scores import perplexity_of
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.mixture import Grid
from mlpmem_ds.models.mixture_scores import mixed_scores
from mlpmem_ds.stages.training.validation import Validation

_GRID = Grid.parse(["0.05:1:0.05"])
_ROWS_AT_ONCE = 4096


class MemoryValidator:
    """Holds this rank's rows of the tuning split; `run` is collective.

    Args:
        source: the base; it is not held.
        corpus: the tuning split.
        point: where the memory reads.
        positions: about so many, in whole windows spread evenly over the split, one at least.
        world: this rank; the windows are dealt.

    Raises:
        UserError: no position of these windows counts, on all ranks (of a corpus with answers).
    """

    def __init__(
        self, source: StateSource, corpus: CorpusSplit, point: CapturePoint, *, positions: int, world: World
    ) -> None:
        windows, counted = corpus.windows(), CountedRows(corpus)
        chosen = windows[:: max(1, math.ceil(corpus.num_positions / positions))]
        mine = deal(chosen, world.rank, world.size)
        # Every rank runs the base as often as rank 0, which has no fewer windows than others: a base that is
        # cut over the ranks needs all of them for each forward.
        padded = mine + chosen[: len(deal(chosen, 0, world.size)) - len(mine)]
        scanned = [
            next(
                scan_positions(
                    source,
                    corpus,
                    Block(window.start, window.stop),
                    {"input": point},
                    batch_windows=1,
                    ahead=False,
                )
            )
            for window in padded
        ]
        parts = [
            (part, slice(None) if (rows := counted.offsets(part.block)) is None else rows, part.block)
            for part in scanned[: len(mine)]
        ]
        inputs = [part.states["input"][rows].to(torch.bfloat16) for part, rows, _ in parts]
        self._world = world
        self._inputs_NI = (
            torch.cat(inputs) if inputs else torch.zeros(0, state_width(source, point), dtype=torch.bfloat16)
        )
        self._labels_N = torch.cat(
            [torch.from_numpy(corpus.values(*block)[rows]) for _, rows, block in parts]
            or [torch.zeros(0, dtype=torch.int64)]
        )
        self._base_N = np.concatenate(
            [part.log_probabilities[rows] for part, rows, _ in parts] or [np.zeros(0)]
        ).astype(np.float64)
        self.num_positions = sum(gather_values(len(self._base_N), world))
        if not self.num_positions:
            raise UserError(
                f"--validation-positions {positions:,}: the windows of the tuning split that are validated"
                " hold no answer: give more positions, or --validate-every none"
            )
        self._num_chunks = max(gather_values(math.ceil(len(self._base_N) / _ROWS_AT_ONCE), world))

    def base_perplexity(self) -> float:
        """Of the base alone, on all ranks' rows; collective."""
        total = sum(gather_values(float(self._base_N.sum()), self._world))
        return float(perplexity_of(total / self.num_positions))

    def run(self, engine: Engine, step: int) -> Validation:
        """Score the memory as it is now."""
        memory_N = self._score(engine)
        sums = [
            self._base_N.sum(),
            memory_N.sum(),
            *(mixed_scores(self._base_N, memory_N, gate.lmbda).sum() for gate in _GRID),
        ]
        totals = np.array(gather_values([float(value) for value in sums], self._world)).sum(axis=0)
        base, memory, *mixtures = perplexity_of(totals / self.num_positions).tolist()
        best = int(np.argmin(mixtures))
        return Validation(
            step=step,
            perplexity=mixtures[best],
            details={
                "base_perplexity": base,
                "memory_perplexity": memory,
                "lambda": _GRID.lambdas[best],
            },
        )

    def _score(self, engine: Engine) -> np.ndarray:
        """float64 [N]: the memory's log-probabilities; every rank runs as many forwards."""
        scores = []
        with engine.evaluating():
            for chunk in range(self._num_chunks):
                rows = slice(chunk * _ROWS_AT_ONCE, (chunk + 1) * _ROWS_AT_ONCE)
                labels_N = self._labels_N[rows]
                if len(labels_N):
                    inputs_NI = self._inputs_NI[rows]
                else:  # the others have more
                    inputs_NI, labels_N = (
                        self._inputs_NI.new_zeros(1, self._inputs_NI.shape[1]),
                        torch.zeros(1).long(),
                    )
                scores_N = engine.forward(
                    inputs_NI.to(engine.device, engine.dtype), None, labels_N.to(engine.device)
                ).cpu()
                scores.append(scores_N[: len(self._labels_N[rows])].double().numpy())
        return np.concatenate(scores)
