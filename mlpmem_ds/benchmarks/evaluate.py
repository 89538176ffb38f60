"""Benchmark `evaluate`: hidden states and two heads → **perplexity of the mixture at each λ**, compared with
two plain ways.

ours          two log-probabilities a position (`label_log_probabilities`, no logits kept), every λ from
              these.
dense_grid    the plain way: log_softmax of both heads over the whole vocabulary, the mixture of both for each
              λ.
dense_gather  less plain: log_softmax of both, then the labels' entries, every λ from these.

All in float32 with sums in float64. CPU seconds are compared. What a λ costs is measured alone, because it is
lost in the noise of the rest: `grid_over_single` = (heads + all λ) / (heads + one λ). Peak memory as in the
benchmark `loss`.

Shape legend: N positions, D width, V vocabulary, G values of λ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.benchmarks.common import (
    Report,
    check_output,
    in_child,
    interleave,
    median_of,
    peak_bytes_above_start,
    row_of,
    timing_rows,
    use_threads,
)
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.world import World
from mlpmem_ds.maths.head_scores import label_log_probabilities
from mlpmem_ds.models.mixture import Grid
from mlpmem_ds.models.mixture_scores import lambda_curve
from mlpmem_ds.stages import shared_flags

_SEED = 2
_WARM_UP = {"positions": 64, "width": 16, "vocab_size": 600}


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Perplexity of base and memory mixed at every λ: from two numbers a position, and from dense mixtures.

    The default sizes take about 2 minutes and 4 GB on two cores.
    """

    example: ClassVar[str] = "python tools/bench.py evaluate --output evaluate.json"

    output: Path = option("JSON file to write")
    positions: int = option("positions to score", 2048, at_least=1)
    width: int = option("numbers in a hidden state", 512, at_least=1)
    vocab_size: int = option("rows of each head's weight", 50257, at_least=1)
    num_lambdas: int = option("values of λ, from 0 to 1", 21, at_least=2)
    runs: int = option("timed runs of each arm", 3, at_least=1)
    threads: int | None = shared_flags.threads()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every arm is given: what the two heads read, their weights, the values, the grid."""

    base_hidden_ND: Tensor
    base_weight_VD: Tensor
    memory_hidden_ND: Tensor
    memory_weight_VD: Tensor
    labels_N: Tensor
    grid: Grid


def run(config: Config, world: World) -> None:
    check_output(config.output)
    use_threads(config.threads)
    report = Report("evaluate", config)
    difference = greatest_difference(_warm_up_config(config))
    problem = make_problem(config)
    rows = timing_rows(interleave({name: partial(arm, problem) for name, arm in ARMS.items()}, config.runs))
    logs = label_logs(problem)
    parts = {
        "lambda_grid": partial(lambda_curve, *logs, problem.grid),
        "lambda_single": partial(lambda_curve, *logs, Grid(problem.grid.lambdas[1:2])),
    }
    rows += timing_rows(interleave(parts, 5 * config.runs))
    del problem
    for arm in ARMS:
        rows.append(row_of(arm, "peak_memory_above_start", "B", [in_child(_peak_of_arm, arm, config)]))
    ours, grid, single = (
        median_of(rows, arm, "cpu_seconds") for arm in ("ours", "lambda_grid", "lambda_single")
    )
    peak = partial(median_of, rows, metric="peak_memory_above_start")
    ratios = {
        "grid_over_single": ours / (ours - grid + single),
        "speed_over_dense_grid": median_of(rows, "dense_grid", "cpu_seconds") / ours,
        "speed_over_dense_gather": median_of(rows, "dense_gather", "cpu_seconds") / ours,
        "peak_memory_over_dense_grid": peak("ours") / peak("dense_grid"),
        "peak_memory_over_dense_gather": peak("ours") / peak("dense_gather"),
        "perplexity_difference": difference,
    }
    report.publish(config.output, rows, ratios)


def make_problem(config: Config) -> Problem:
    """Random hidden states and heads whose logits have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(_SEED)

    def normal(rows: int, scale: float) -> Tensor:
        return scale * torch.randn(rows, config.width, generator=generator)

    return Problem(
        base_hidden_ND=normal(config.positions, 1.0),
        base_weight_VD=normal(config.vocab_size, 2 / math.sqrt(config.width)),
        memory_hidden_ND=normal(config.positions, 1.0),
        memory_weight_VD=normal(config.vocab_size, 2 / math.sqrt(config.width)),
        labels_N=torch.randint(config.vocab_size, (config.positions,), generator=generator),
        grid=Grid(tuple(np.linspace(0, 1, config.num_lambdas).tolist())),
    )


def label_logs(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the labels under base and memory, float32 [N]."""
    base_N = label_log_probabilities(problem.base_hidden_ND, problem.base_weight_VD, problem.labels_N)
    memory_N = label_log_probabilities(problem.memory_hidden_ND, problem.memory_weight_VD, problem.labels_N)
    return base_N.numpy(), memory_N.numpy()


def ours(problem: Problem) -> list[float]:
    """Perplexity at each λ."""
    curve: list[float] = lambda_curve(*label_logs(problem), problem.grid).tolist()
    return curve


@torch.no_grad()
def dense_grid(problem: Problem) -> list[float]:
    base_NV, memory_NV = _dense_log_probabilities(problem)
    labels_N1 = problem.labels_N[:, None]
    perplexities = []
    for weight in problem.grid.lambdas:
        keep, take = (math.log(share) if share > 0 else -math.inf for share in (1 - weight, weight))
        mixture_NV = torch.logaddexp(base_NV + keep, memory_NV + take)
        perplexities.append(math.exp(-mixture_NV.gather(1, labels_N1).double().mean()))
    return perplexities


@torch.no_grad()
def dense_gather(problem: Problem) -> list[float]:
    logs = [
        log_NV.gather(1, problem.labels_N[:, None])[:, 0].numpy()
        for log_NV in _dense_log_probabilities(problem)
    ]
    curve: list[float] = lambda_curve(logs[0], logs[1], problem.grid).tolist()
    return curve


ARMS: dict[str, Callable[[Problem], list[float]]] = {
    "ours": ours,
    "dense_grid": dense_grid,
    "dense_gather": dense_gather,
}


def _dense_log_probabilities(problem: Problem) -> tuple[Tensor, Tensor]:
    base_NV = torch.log_softmax(problem.base_hidden_ND @ problem.base_weight_VD.t(), dim=1)
    return base_NV, torch.log_softmax(problem.memory_hidden_ND @ problem.memory_weight_VD.t(), dim=1)


def greatest_difference(config: Config) -> float:
    """How far the other arms' perplexities are from those of `dense_grid`, relative, at any λ."""
    problem = make_problem(config)
    expected = np.array(dense_grid(problem))
    return max(float(np.abs(np.array(arm(problem)) / expected - 1).max()) for arm in (ours, dense_gather))


def _warm_up_config(config: Config) -> Config:
    """Sizes that are over in a moment."""
    return dataclasses.replace(
        config, **{name: min(size, getattr(config, name)) for name, size in _WARM_UP.items()}
    )


def _peak_of_arm(name: str, config: Config) -> int:
    """In a child: the arm's peak memory above its start."""
    use_threads(config.threads)
    ARMS[name](make_problem(_warm_up_config(config)))
    problem = make_problem(config)
    return peak_bytes_above_start(lambda: ARMS[name](problem))
