"""Part of `train_base`: the perplexity of the base on the corpus's tuning split.

B sequences, S tokens of a sequence, T = S + 1, N = B * S, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.engine import Engine
from mlpmem_ds.engines.processes import gather_values
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.maths.head_scores import label_log_probabilities
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.stages.base.objective import NextTokenModule
from mlpmem_ds.stages.training.validation import Validation

_WINDOWS_AT_ONCE = 16


class BaseValidator:
    """Scores every position of the tuning split, in the corpus's blocks; the ranks share the windows."""

    def __init__(self, tuning: CorpusSplit, world: World) -> None:
        self._tuning, self._world = tuning, world
        self._windows = deal(tuning.windows(), world.rank, world.size)

    def run(self, engine: Engine, step: int) -> Validation:
        module, total = engine.module, 0.0
        assert isinstance(module, NextTokenModule)
        with engine.evaluating():
            for score in self._scores(module, engine.device):
                total += score  # in this order: the sum's last bits reach a file
        totals = gather_values(total, self._world)
        return Validation(step=step, perplexity=math.exp(-math.fsum(totals) / self._tuning.num_positions))

    def _scores(self, module: NextTokenModule, device: torch.device) -> Iterator[float]:
        """The log-probability of each of this rank's windows, of the positions that it predicts."""
        weight_VD = output_head(module.model)[0]
        for first in range(0, len(self._windows), _WINDOWS_AT_ONCE):
            windows = self._windows[first : first + _WINDOWS_AT_ONCE]
            tokens_BT = torch.from_numpy(
                np.stack([self._tuning.tokens(window.context_start, window.stop + 1) for window in windows])
            ).to(device)
            scores_N = label_log_probabilities(
                module.hidden(tokens_BT[:, :-1]), weight_VD, tokens_BT[:, 1:].reshape(-1)
            )
            scores_BS = scores_N.double().reshape(len(windows), -1)
            for window, scores_S in zip(windows, scores_BS, strict=True):
                yield float(scores_S[window.start - window.context_start :].sum())
