"""Training only: the best fixed weights of a bank, and a gate's net fitted to text.

Both minimize the mean over positions of -log p of the mixture at the token that followed, from
log-probabilities that were stored: no base and no memory runs. Positions have weights of their own, so that
each text counts the same, however long it is.

Shapes: N positions, M memories, F features.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch

from mlpmem_ds.models.gates import LearnedGate
from mlpmem_ds.models.mixture import log_mixture_of_bank

_EM_STEPS = 2000
_EM_CHANGE = 1e-7


@dataclass(frozen=True, kw_only=True)
class GateRows:
    """What a gate is fitted to: positions with their features, and what each model gave to the token."""

    features_NF: torch.Tensor
    """float32"""
    log_base_N: torch.Tensor
    """float64, natural"""
    log_memories_NM: torch.Tensor
    """float64"""
    shares_N: torch.Tensor
    """float64: what each position counts, with the sum 1"""

    def loss(self, lmbdas: torch.Tensor) -> torch.Tensor:
        """Mean nats a position of the mixture, for weights [M] or [N, M]."""
        mixed_N = log_mixture_of_bank(self.log_base_N, self.log_memories_NM.unbind(-1), lmbdas)
        return -(self.shares_N * mixed_N).sum()

    def take(self, rows: torch.Tensor) -> GateRows:
        """Some rows, whose shares are made to sum to 1 again."""
        shares_N = self.shares_N[rows]
        return GateRows(
            features_NF=self.features_NF[rows],
            log_base_N=self.log_base_N[rows],
            log_memories_NM=self.log_memories_NM[rows],
            shares_N=shares_N / shares_N.sum(),
        )

    @staticmethod
    def joined(parts: list[GateRows]) -> GateRows:
        """Several texts, each of which counts the same."""
        return GateRows(
            features_NF=torch.cat([part.features_NF for part in parts]),
            log_base_N=torch.cat([part.log_base_N for part in parts]),
            log_memories_NM=torch.cat([part.log_memories_NM for part in parts]),
            shares_N=torch.cat([part.shares_N / part.shares_N.sum() for part in parts]) / len(parts),
        )


@torch.no_grad()
def best_weights(rows: GateRows) -> tuple[float, ...]:
    """The fixed weights [M] of the lowest loss, in millionths that sum to 1 at most.

    By expectation maximization: the loss is convex in them, so that any start gives the same.
    """
    logs_NK = torch.cat([rows.log_base_N[:, None], rows.log_memories_NM], dim=1)
    scaled_NK = (logs_NK - logs_NK.amax(dim=1, keepdim=True)).exp()
    weights_K = torch.full((logs_NK.shape[1],), 1 / logs_NK.shape[1], dtype=torch.float64)
    for _ in range(_EM_STEPS):
        before_K = weights_K
        weights_K = before_K * ((rows.shares_N / (scaled_NK @ before_K)) @ scaled_NK)
        weights_K = weights_K / weights_K.sum()
        if float((weights_K - before_K).abs().max()) < _EM_CHANGE:
            break
    millionths = [round(1e6 * float(weight)) for weight in weights_K[1:]]
    excess = max(sum(millionths) - 1_000_000, 0)
    millionths[millionths.index(max(millionths))] -= excess
    return tuple(count / 1e6 for count in millionths)


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a gate is fitted: AdamW on batches of positions."""

    learning_rate: float
    max_epochs: int
    patience: int
    """epochs without a better stopping loss after which it ends"""
    batch_positions: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a fit went, in nats a position; epoch 0 is the best fixed weights."""

    epochs: int
    best_epoch: int
    fitted_losses: tuple[float, ...]
    """after each epoch, on what it is fitted to"""
    stopping_losses: tuple[float, ...]
    """on the rows that choose the epoch"""


def fit_gate(gate: LearnedGate, rows: GateRows, stopping: GateRows, settings: FitSettings) -> Fit:
    """Fit the net in place, from the best fixed weights; it is left as it was at the epoch with the lowest
    loss on the stopping rows.

    The features are standardized by the fitted rows. Of the same inputs the result is the same, bit for bit,
    on the same machine and with the same number of threads.
    """
    lmbdas = best_weights(rows)
    _start(gate, rows, lmbdas, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=settings.learning_rate)
    fitted, stopped = [_loss(gate, rows)], [_loss(gate, stopping)]
    best, best_epoch = copy.deepcopy(gate.state_dict()), 0
    for epoch in range(1, settings.max_epochs + 1):
        for batch in torch.randperm(len(rows.shares_N), generator=generator).split(settings.batch_positions):
            part = rows.take(batch)
            optimizer.zero_grad()
            part.loss(gate.weights(part.features_NF)).backward()
            optimizer.step()
        fitted.append(_loss(gate, rows))
        stopped.append(_loss(gate, stopping))
        if not math.isfinite(stopped[-1]):
            break
        if stopped[-1] < stopped[best_epoch]:
            best, best_epoch = copy.deepcopy(gate.state_dict()), epoch
        if epoch - best_epoch >= settings.patience:
            break
    gate.load_state_dict(best)
    return Fit(
        epochs=len(stopped) - 1,
        best_epoch=best_epoch,
        fitted_losses=tuple(fitted),
        stopping_losses=tuple(stopped),
    )


@torch.no_grad()
def _start(gate: LearnedGate, rows: GateRows, lmbdas: tuple[float, ...], seed: int) -> None:
    """Fresh first layers, the features' mean and deviation, and the best fixed weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in gate.named_parameters():
        if not name.startswith("out."):
            bound = 1 / math.sqrt(parameter.shape[-1] if parameter.ndim > 1 else gate.layer.in_features)
            parameter.uniform_(-bound, bound, generator=generator)
    features_NF = rows.features_NF.double()
    mean_F = rows.shares_N @ features_NF
    deviation_F = (rows.shares_N @ (features_NF - mean_F) ** 2).sqrt()
    gate.standardize(mean_F.float(), deviation_F.float())
    gate.start_from(lmbdas)


@torch.no_grad()
def _loss(gate: LearnedGate, rows: GateRows) -> float:
    return float(rows.loss(gate.weights(rows.features_NF)))
