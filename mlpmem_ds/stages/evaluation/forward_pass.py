"""Part of `evaluate`: one model's forward pass over a block of text, which serves every arm that reads it.

n positions of a block, D width of a state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.hidden_states import BatchStates, TransformersSource, scan_positions
from mlpmem_ds.engines.host_copies import to_device
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.maths.head_scores import HeadScores, head_scores
from mlpmem_ds.models.capture_point import CapturePoint

_CPU_TOKENS = 2048  # of a forward on a CPU; from a few hundred on, more at once are no faster


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a model says of the positions of a block, and the states that were asked for."""

    corpus: CorpusSplit
    block: Block
    values_n: np.ndarray
    """int64: the tokens that follow"""
    log_probabilities_n: np.ndarray
    """float32: natural, of the values"""
    top_ids_n: np.ndarray
    """int64: the model's likeliest tokens"""
    guesses_n3: np.ndarray
    """float32: the likeliest token's log-probability, the distribution's entropy in nats, and 1 where that
    token is the value"""
    states: Mapping[CapturePoint, torch.Tensor]
    """float32 [n, D], on the CPU"""


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardPass:
    """A model, and how its passes over a text are cut."""

    source: TransformersSource
    name: str | None
    """stands in the names of its units; None for the base's"""
    batch_windows: int
    """windows that a GPU reads at once"""

    def windows_at_once(self, corpus: CorpusSplit) -> int:
        """How many windows go through the model in one forward: `batch_windows` on a GPU.

        Products of another number of rows may round otherwise, and a sum over a corpus shows it. On a CPU,
        where more than a few hundred rows at once gain nothing, every forward of a text is therefore cut
        alike, for any `batch_windows`.
        """
        if self.source.device.type != "cpu":
            return self.batch_windows
        return max(1, _CPU_TOKENS // min(corpus.block_size, max(1, corpus.num_positions)))

    def scan(self, corpus: CorpusSplit, block: Block, points: Iterable[CapturePoint]) -> Scan:
        """Run the windows that predict a block's positions, and read these points of the model.

        Raises:
            UserError: a log-probability is not finite.
        """
        names = {f"state {number}": point for number, point in enumerate(dict.fromkeys(points))}
        scoring = _ScoringSource(self.source)
        at_once = self.windows_at_once(corpus)
        rows = list(scan_positions(scoring, corpus, block, names, batch_windows=at_once))
        log_probabilities_n = np.concatenate([batch.log_probabilities for batch in rows])
        _check_finite(log_probabilities_n, corpus, block)
        values_n, found = corpus.values(*block), scoring.joined()
        top_ids_n = found.top_ids_N.numpy()
        is_correct_n = (top_ids_n == values_n).astype(np.float32)
        return Scan(
            corpus=corpus,
            block=block,
            values_n=values_n,
            log_probabilities_n=log_probabilities_n,
            top_ids_n=top_ids_n,
            guesses_n3=np.stack([found.top_N.numpy(), found.entropies_N.numpy(), is_correct_n], axis=1),
            states={
                point: torch.cat([batch.states[name] for batch in rows]).float()
                for name, point in names.items()
            },
        )

    def score_tokens(self, corpus: CorpusSplit, block: Block, tokens_nJ: np.ndarray) -> HeadScores:
        """What the model says of a block's positions, at tokens int64 [n, J] of the caller's choice; on the
        CPU.

        Raises:
            UserError: a log-probability is not finite.
        """
        scoring = _ScoringSource(self.source, tokens_nJ)
        at_once = self.windows_at_once(corpus)
        for _ in scan_positions(scoring, corpus, block, {}, batch_windows=at_once, ahead=False):
            pass
        found = scoring.joined()
        _check_finite(found.log_probabilities_NJ.numpy().min(axis=1), corpus, block)
        return found


class _Source:
    """A source that is asked for more than the log-probabilities that it gives."""

    is_collective = False

    def __init__(self, source: TransformersSource) -> None:
        self._source = source
        self._transform = None if source.transform.is_identity else source.transform
        self.num_layers, self.width, self.vocab_size = source.num_layers, source.width, source.vocab_size
        self.final_width = source.final_width
        self.max_context, self.dtype_name = source.max_context, source.dtype_name
        self.attention = source.attention

    def read(self, tokens_BS: torch.Tensor, points: Mapping[str, CapturePoint]) -> BatchStates:
        return self._source.read(tokens_BS, points)


class _ScoringSource(_Source):
    """A source that keeps, with each log-probability that it is asked for, the likeliest token and the
    entropy.

    `tokens_nJ`, in the order of the positions: whose log-probabilities are kept in place of the values'.
    """

    def __init__(self, source: TransformersSource, tokens_nJ: np.ndarray | None = None) -> None:
        super().__init__(source)
        self._tokens_nJ = None if tokens_nJ is None else torch.from_numpy(tokens_nJ)
        self._next = 0
        self._parts: list[HeadScores] = []

    def log_probabilities(self, final_ND: torch.Tensor, values_N: torch.Tensor) -> torch.Tensor:
        """Of the values; where other tokens are kept, of the first of them."""
        tokens_NJ = values_N[:, None]
        if self._tokens_nJ is not None:
            tokens_NJ = self._tokens_nJ[self._next : self._next + len(final_ND)]
            self._next += len(final_ND)
        with self._source.head() as (weight_VD, bias_V):
            device = weight_VD.device
            final_ND, tokens_NJ = final_ND.to(device), to_device(tokens_NJ, device)
            self._parts.append(
                head_scores(final_ND, weight_VD, tokens_NJ, bias=bias_V, transform=self._transform)
            )
        return self._parts[-1].log_probabilities_NJ[:, 0]

    def joined(self) -> HeadScores:
        """All that was kept, on the CPU."""
        return HeadScores(
            log_probabilities_NJ=torch.cat([part.log_probabilities_NJ for part in self._parts]).cpu(),
            top_ids_N=torch.cat([part.top_ids_N for part in self._parts]).cpu(),
            top_N=torch.cat([part.top_N for part in self._parts]).cpu(),
            entropies_N=torch.cat([part.entropies_N for part in self._parts]).cpu(),
        )


def _check_finite(log_probabilities_n: np.ndarray, corpus: CorpusSplit, block: Block) -> None:
    if not np.isfinite(log_probabilities_n).all():
        position = block.start + int(np.flatnonzero(~np.isfinite(log_probabilities_n))[0])
        raise UserError(
            f"the log-probability at position {position} of split {corpus.name} is not finite: the model's"
            " weights are damaged, or --dtype float32 is needed"
        )
