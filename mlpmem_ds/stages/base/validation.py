"""Part of `train_base`: the perplexity of the base on the corpus's tuning split.

B windows, S tokens of each, T as they are read, N = B * S, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block, deal
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.engine import Engine
from mlpmem_ds.engines.processes import gather_values
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.window_tokens import window_tokens
from mlpmem_ds.maths.head_scores import label_log_probabilities
from mlpmem_ds.maths.scores import perplexity_of
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.stages.base.objective import NextTokenModule
from mlpmem_ds.stages.training.validation import Validation

_WINDOWS_AT_ONCE = 16


class BaseValidator:
    """Scores the positions of the tuning split that count, in the corpus's blocks; the ranks share the
    windows."""

    def __init__(self, tuning: CorpusSplit, world: World) -> None:
        self._tuning, self._world = tuning, world
        self._windows = deal(tuning.windows(), world.rank, world.size)

    def run(self, engine: Engine, step: int) -> Validation:
        module, total = engine.module, 0.0
        assert isinstance(module, NextTokenModule)
        with engine.evaluating():
            for score in self._scores(module, engine.device):
                total += score  # in this order: the sum's last bits reach a file
        mean = math.fsum(gather_values(total, self._world)) / self._tuning.num_counted
        return Validation(step=step, perplexity=float(perplexity_of(mean)))

    def _scores(self, module: NextTokenModule, device: torch.device) -> Iterator[float]:
        """The log-probability of each of this rank's windows, of the positions that it predicts."""
        weight_VD = output_head(module.model)[0]
        for first in range(0, len(self._windows), _WINDOWS_AT_ONCE):
            windows = self._windows[first : first + _WINDOWS_AT_ONCE]
            tokens = window_tokens(self._tuning, windows)
            hidden_BTD = module.hidden(torch.from_numpy(tokens.tokens_BT).to(device))
            blocks = [Block(window.context_start, window.stop) for window in windows]
            hidden_ND = torch.cat(
                [hidden_BTD[row, tokens.columns(row, block)] for row, block in enumerate(blocks)]
            )
            values_N = torch.from_numpy(np.concatenate([self._tuning.values(*block) for block in blocks]))
            scores_N = label_log_probabilities(hidden_ND, weight_VD, values_N.to(device))
            scores_BS = scores_N.double().reshape(len(windows), -1)
            for window, scores_S in zip(windows, scores_BS, strict=True):
                own_n = scores_S[window.start - window.context_start :]
                if self._tuning.has_answers:
                    own_n = own_n[torch.from_numpy(self._tuning.counted(window.start, window.stop))]
                yield float(own_n.sum())
