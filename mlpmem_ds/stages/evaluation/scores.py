"""What `evaluate` asks of a model at each position: the value's log-probability, and of its first guess how
sure it was.

n positions of a unit, D width of a state, J tokens asked for at a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.hidden_states import BatchStates, TransformersSource, scan_positions
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.maths.head_scores import HeadScores, head_scores, token_log_probabilities
from mlpmem_ds.models.backbone import CapturePoint, LogitTransform, logit_transform
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.quantized import Int8Linear
from mlpmem_ds.models.structure import output_head

_CPU_TOKENS = 2048  # of a forward on a CPU; from a few hundred on, more at once are no faster
_MEMORY_ROWS = 2048  # rows whose activations are at hand: 4 · F bytes each and matrix, 117 MB for F = 14,336
_INT8_ROWS = 256  # rows whose logits are at hand where the head is int8


@dataclass(frozen=True, kw_only=True)
class PassScores:
    """One pass of a model over a block: float32 [n] log-probabilities of the values, its likeliest tokens,
    its states."""

    log_probabilities_n: np.ndarray
    top_ids_n: np.ndarray
    """int64"""
    guesses_n3: np.ndarray
    """float32: the likeliest token's log-probability, the entropy in nats, and 1 where that token is the
    value"""
    states: Mapping[str, torch.Tensor]
    """named, float32 [n, D]"""


class _ScoringSource:
    """A source that keeps, beside each log-probability that it is asked for, the likeliest token and the
    entropy."""

    is_collective = False

    def __init__(self, source: TransformersSource) -> None:
        self._source = source
        self._transform: LogitTransform = logit_transform(source.model)
        self.num_layers, self.width, self.vocab_size = source.num_layers, source.width, source.vocab_size
        self.max_context, self.dtype_name = source.max_context, source.dtype_name
        self.parts: list[HeadScores] = []

    def read(self, tokens_BS: torch.Tensor, points: Mapping[str, CapturePoint]) -> BatchStates:
        return self._source.read(tokens_BS, points)

    def log_probabilities(self, final_ND: torch.Tensor, values_N: torch.Tensor) -> np.ndarray:
        weight_VD, bias_V = output_head(self._source.model)
        transform = None if self._transform.is_identity else self._transform
        values_N1 = values_N.to(self._source.device)[:, None]
        self.parts.append(head_scores(final_ND, weight_VD, values_N1, bias=bias_V, transform=transform))
        result_N: np.ndarray = self.parts[-1].log_probabilities_NJ[:, 0].cpu().numpy()
        return result_N


def windows_at_once(source: TransformersSource, corpus: CorpusSplit, batch_windows: int) -> int:
    """How many windows go through the base in one forward: `batch_windows` on a GPU.

    Products of another number of rows may round otherwise, and a sum over a corpus shows it. On a CPU, where
    more than a few hundred rows at once gain nothing, every forward of a text is therefore cut alike,
    whatever `batch_windows` is.
    """
    if source.device.type != "cpu":
        return batch_windows
    return max(1, _CPU_TOKENS // min(corpus.block_size, max(1, corpus.num_positions)))


def scan(
    source: TransformersSource,
    corpus: CorpusSplit,
    block: Block,
    points: Mapping[str, CapturePoint],
    *,
    batch_windows: int,
) -> PassScores:
    """One pass over the windows that predict a block's positions; `batch_windows` as in `windows_at_once`.

    Raises:
        UserError: a log-probability is not finite.
    """
    scoring = _ScoringSource(source)
    at_once = windows_at_once(source, corpus, batch_windows)
    rows = list(scan_positions(scoring, corpus, block, points, batch_windows=at_once))
    log_probabilities_n = np.concatenate([batch.log_probabilities for batch in rows])
    if not np.isfinite(log_probabilities_n).all():
        position = block.start + int(np.flatnonzero(~np.isfinite(log_probabilities_n))[0])
        raise UserError(
            f"the log-probability at position {position} of split {corpus.name} is not finite: the model's"
            " weights are damaged, or --dtype float32 is needed"
        )
    top_ids_n = torch.cat([part.top_ids_N for part in scoring.parts]).cpu().numpy()
    guesses = [
        torch.cat([part.top_N for part in scoring.parts]),
        torch.cat([part.entropies_N for part in scoring.parts]),
    ]
    came_n = (top_ids_n == corpus.values(*block)).astype(np.float32)
    return PassScores(
        log_probabilities_n=log_probabilities_n,
        top_ids_n=top_ids_n,
        guesses_n3=np.stack([*(column.cpu().numpy() for column in guesses), came_n], axis=1),
        states={name: torch.cat([batch.states[name] for batch in rows]) for name in points},
    )


@torch.no_grad()
def memory_log_probabilities(memory: Memory, inputs_nD: torch.Tensor, tokens_nJ: np.ndarray) -> np.ndarray:
    """log p_mem(token), float32 [n, J], from float32 logits; the inputs are taken to the memory's dtype and
    device.

    Raises:
        UserError: one is not a number, as damaged weights or an overflow in float16 make it.
    """
    norm: torch.Tensor = memory.final_norm.weight  # type: ignore[assignment]
    parts = inputs_nD.split(_MEMORY_ROWS)
    hidden_nH = torch.cat([memory(part.to(dtype=norm.dtype, device=norm.device)) for part in parts])
    tokens = torch.from_numpy(tokens_nJ).to(norm.device)
    if isinstance(memory.head, Int8Linear):  # its own product, as generation meets it
        pairs = zip(hidden_nH.split(_INT8_ROWS), tokens.split(_INT8_ROWS), strict=True)
        scores_nJ = torch.cat(
            [memory.head(rows).float().log_softmax(-1).gather(1, wanted) for rows, wanted in pairs]
        )
    else:
        weight_VH: torch.Tensor = memory.head.weight  # type: ignore[assignment]
        scores_nJ = token_log_probabilities(hidden_nH, weight_VH, tokens)
    result_nJ: np.ndarray = scores_nJ.cpu().numpy()
    if not np.isfinite(result_nJ).all():
        raise UserError(
            f"{int((~np.isfinite(result_nJ)).sum())} of {result_nJ.size} log-probabilities of a memory are"
            " not finite: its weights are damaged, or --dtype float32 is needed"
        )
    return result_nJ
