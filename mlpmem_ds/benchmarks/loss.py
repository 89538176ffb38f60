"""Benchmark `loss`: sparse kNN targets → **loss and gradients of the memory's head**, compared with three
others.

ours                `maths.sparse_loss`: chunks of rows, gradients in forward, neither dense target nor all
                    logits.
dense               the published way: targets scattered to N x V, kl_div of log_softmax, cross entropy,
                    autograd.
torch_lce           torch's F.linear_cross_entropy in chunks: the hard label only, so less than is asked.
torch_lce_plus_bag  the same made to compute our loss:
                    Σ m = 1 gives L = CE(y) - Σ h · Σ_i (m_i - [i = y]) W_i + const.
torch_lce_onednn    torch_lce with PyTorch's float32 products by oneDNN, as ours: what is left of the
                    difference is our own. It rests on PyTorch's setting for 16-bit products inside float32,
                    and is left out where the processor has such products, because there it would change the
                    numbers.
products            the three matrix products of any exact loss and nothing else, by the same libraries as
                    ours: the least time that a loss can take on this processor. It says which part of a ratio
                    is the processor's.
ours_joined         ours with a teacher that is joined with the base, of the memory's own width: a fourth
                    product, and statistics of a second distribution.
ours_bfloat16       ours with 16-bit operands (float32 statistics and gradient of the weight): another
                    precision.

All other arms are float32, forward and backward, with gradients of both the hidden states and the head's
weight. CPU seconds are compared, for wall seconds depend on who else computes. Peak memory is that of one
fresh process an arm, above its start (which holds hidden states, weight and sparse targets, but no gradient):
see common.peak_bytes_above_start. Where there is a CUDA device, `loss_gpu` adds rows of its own.

Shape legend: N rows, D width, V vocabulary, K teacher entries a row, E = N K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
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
from mlpmem_ds.benchmarks.loss_gpu import gpu_rows
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.maths.based_chunk import BaseLogits, BasePart
from mlpmem_ds.maths.products import logits_of_tile, product, set_transposed_product, vocabulary_tiles
from mlpmem_ds.maths.sparse_loss import DEFAULT_CHUNK_BYTES, TargetBatch, sparse_loss
from mlpmem_ds.models.memory_config import DEFAULT_LAMBDA
from mlpmem_ds.stages import shared_flags

_SEED = 1
_WARM_UP = {"rows": 96, "width": 32, "vocab_size": 640, "entries": 8}

Outcome: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Loss (a sum over the rows), gradient of the hidden states [N, D], gradient of the weight [V, D]."""


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Loss and gradients of the head for sparse targets: ours, dense autograd, torch's fused hard-label loss.

    The default sizes take about 3 minutes and 6 GB on two cores; a CUDA device adds a minute and 8 GB of its
    own.
    """

    example: ClassVar[str] = "python tools/bench.py loss --output loss.json"

    output: Path = option("JSON file to write")
    rows: int = option("rows of hidden states (tokens)", 4096, at_least=1)
    width: int = option("numbers in a hidden state", 512, at_least=1)
    vocab_size: int = option("rows of the head's weight", 50257, at_least=1)
    entries: int = option("teacher entries of each row", 64, at_least=1)
    alpha: float = option("weight of KL against cross entropy", 0.5, at_least=0, at_most=1)
    chunk_bytes: int = option("bytes of logits that ours holds at once", DEFAULT_CHUNK_BYTES, at_least=1)
    torch_chunk_rows: int | None = option(
        "rows of a chunk of torch's fused loss; none = its own choice", 512, at_least=1
    )
    runs: int = option("timed runs of each arm", 5, at_least=1)
    threads: int | None = shared_flags.threads()

    def check(self) -> None:
        if self.entries > self.vocab_size:
            raise UserError(
                f"--entries {self.entries} distinct ids do not fit in --vocab-size {self.vocab_size}"
            )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every arm is given."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets: TargetBatch
    alpha: float


def run(config: Config, world: World) -> None:
    check_output(config.output)
    use_threads(config.threads)
    report = Report("loss", config)
    loss_difference, gradient_difference = differences(_warm_up_config(config))
    problem = make_problem(config)
    timings = interleave(
        {name: partial(arm, problem, config) for name, arm in timed_arms().items()}, config.runs
    )
    rows = timing_rows(timings)
    del problem
    for arm in ARMS:
        peak = in_child(_peak_of_arm, arm, config)
        rows.append(row_of(arm, "peak_memory_above_start", "B", [peak]))
    ratios = {
        name: median_of(rows, "ours", metric) / median_of(rows, anchor, metric)
        for name, metric, anchor in (
            ("cpu_time_over_dense", "cpu_seconds", "dense"),
            ("cpu_time_over_torch_lce", "cpu_seconds", "torch_lce"),
            ("cpu_time_over_torch_lce_plus_bag", "cpu_seconds", "torch_lce_plus_bag"),
            ("cpu_time_over_products", "cpu_seconds", "products"),
            ("wall_time_over_dense", "wall_seconds", "dense"),
            ("peak_memory_over_dense", "peak_memory_above_start", "dense"),
            ("peak_memory_over_torch_lce", "peak_memory_above_start", "torch_lce"),
        )
    }
    own_seconds = median_of(rows, "ours", "cpu_seconds")
    ratios["cpu_time_joined_over_imitation"] = median_of(rows, "ours_joined", "cpu_seconds") / own_seconds
    ratios["products_over_dense"] = median_of(rows, "products", "cpu_seconds") / median_of(
        rows, "dense", "cpu_seconds"
    )
    ratios["cpu_time_bfloat16_over_float32"] = median_of(rows, "ours_bfloat16", "cpu_seconds") / own_seconds
    if "torch_lce_onednn" in timings:
        ratios["cpu_time_over_torch_lce_onednn"] = own_seconds / median_of(
            rows, "torch_lce_onednn", "cpu_seconds"
        )
    if torch.cuda.is_available():
        more_rows, more_ratios = gpu_rows("cuda", runs=config.runs)
        rows += more_rows
        ratios |= more_ratios
    ratios |= {"loss_difference": loss_difference, "gradient_difference": gradient_difference}
    report.publish(config.output, rows, ratios)


def make_problem(config: Config) -> Problem:
    """Random hidden states and weight; `entries` distinct ascending ids a row, as target shards hold them.

    Labels are one of the row's own ids in two rows of three, any id in the others.
    """
    generator = torch.Generator().manual_seed(_SEED)
    num_rows, num_ids = config.rows, config.vocab_size
    # Cloned, or all the permutations live until they are stacked; the hole that 1.6 GB leave in the heap
    # would take the arms' large tensors and keep them after they are freed (peaks of 330, 540 or 740 MB for
    # the same work).
    ids_NK = torch.stack(
        [torch.randperm(num_ids, generator=generator)[: config.entries].clone() for _ in range(num_rows)]
    )
    logits_NK = 2 * torch.randn(num_rows, config.entries, generator=generator)
    labels_N = torch.randint(num_ids, (num_rows,), generator=generator)
    labels_N = torch.where(torch.arange(num_rows) % 3 == 0, labels_N, ids_NK[:, 0])
    ids_NK = ids_NK.sort(dim=1).values
    return Problem(
        hidden_ND=torch.randn(num_rows, config.width, generator=generator),
        weight_VD=torch.randn(num_ids, config.width, generator=generator) / config.width**0.5,
        targets=TargetBatch(
            offsets_N1=torch.arange(num_rows + 1) * config.entries,
            ids=ids_NK.reshape(-1),
            probabilities=logits_NK.softmax(1).reshape(-1),
            labels_N=labels_N,
        ),
        alpha=config.alpha,
    )


def ours(problem: Problem, config: Config) -> Outcome:
    hidden_ND, weight_VD = _leaves(problem)
    loss, _ = sparse_loss(
        hidden_ND, weight_VD, problem.targets, alpha=problem.alpha, chunk_bytes=config.chunk_bytes
    )
    return _outcome(loss, hidden_ND, weight_VD)


def ours_joined(problem: Problem, config: Config) -> Outcome:
    hidden_ND, weight_VD = _leaves(problem)
    base = BaseLogits(hidden_NB=problem.hidden_ND.flip(0), weight_VB=problem.weight_VD.flip(0))
    loss, _ = sparse_loss(
        hidden_ND,
        weight_VD,
        problem.targets,
        alpha=problem.alpha,
        base=BasePart(logits=base, joined_lambda=DEFAULT_LAMBDA),
        chunk_bytes=config.chunk_bytes,
    )
    return _outcome(loss, hidden_ND, weight_VD)


def dense(problem: Problem, config: Config) -> Outcome:
    hidden_ND, weight_VD = _leaves(problem)
    ids_NK, probabilities_NK = _as_matrices(problem)
    targets_NV = torch.zeros(len(hidden_ND), len(weight_VD)).scatter_add_(1, ids_NK, probabilities_NK)
    logits_NV = hidden_ND @ weight_VD.t()
    kl = F.kl_div(F.log_softmax(logits_NV, dim=1), targets_NV, reduction="sum")
    ce = F.cross_entropy(logits_NV, problem.targets.labels_N, reduction="sum")
    return _outcome(problem.alpha * kl + (1 - problem.alpha) * ce, hidden_ND, weight_VD)


def torch_lce(problem: Problem, config: Config) -> Outcome:
    hidden_ND, weight_VD = _leaves(problem)
    return _outcome(_fused_cross_entropy(hidden_ND, weight_VD, problem, config), hidden_ND, weight_VD)


def torch_lce_plus_bag(problem: Problem, config: Config) -> Outcome:
    hidden_ND, weight_VD = _leaves(problem)
    ids_NK, probabilities_NK = _as_matrices(problem)
    labels_N1 = problem.targets.labels_N[:, None]
    # m - onehot(y) = α t - α onehot(y)
    places_NJ = torch.cat([ids_NK, labels_N1], dim=1)
    weights_NJ = problem.alpha * torch.cat(
        [probabilities_NK, -torch.ones_like(labels_N1, dtype=torch.float32)], dim=1
    )
    bags_ND = F.embedding_bag(places_NJ, weight_VD, per_sample_weights=weights_NJ, mode="sum")
    constant = problem.alpha * torch.xlogy(probabilities_NK, probabilities_NK).sum()
    cross_entropy = _fused_cross_entropy(hidden_ND, weight_VD, problem, config)
    return _outcome(cross_entropy - (hidden_ND * bags_ND).sum() + constant, hidden_ND, weight_VD)


def ours_bfloat16(problem: Problem, config: Config) -> Outcome:
    small = dataclasses.replace(
        problem, hidden_ND=problem.hidden_ND.bfloat16(), weight_VD=problem.weight_VD.bfloat16()
    )
    return ours(small, config)


def products(problem: Problem, config: Config) -> Outcome:
    """The logits and both gradients as products of a tile of the vocabulary each; the logits stand for their
    own gradient, which has their shape."""
    hidden_ND, weight_VD = problem.hidden_ND, problem.weight_VD
    hidden_DN = hidden_ND.t().contiguous()
    d_hidden_ND, d_weight_VD = torch.zeros_like(hidden_ND), torch.empty_like(weight_VD)
    for columns in vocabulary_tiles(len(weight_VD), hidden_ND.device):
        logits_NT = logits_of_tile(hidden_ND, weight_VD[columns])
        d_hidden_ND += product(logits_NT, weight_VD[columns])
        set_transposed_product(d_weight_VD[columns], hidden_DN, logits_NT, accumulate=False)
    return torch.zeros(()), d_hidden_ND, d_weight_VD


def torch_lce_onednn(problem: Problem, config: Config) -> Outcome:
    with onednn_products():
        return torch_lce(problem, config)


@contextmanager
def onednn_products() -> Iterator[None]:
    """PyTorch's float32 products by oneDNN within; only where `onednn_products_are_float32`."""
    settings: Any = torch.backends.mkldnn
    before = settings.matmul.fp32_precision
    settings.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.matmul.fp32_precision = before


def onednn_products_are_float32() -> bool:
    """Whether the setting leaves float32 products as they are; operands that bfloat16 cannot hold would show
    it."""
    if not hasattr(torch.backends.mkldnn, "matmul") or not torch.backends.mkldnn.is_available():
        return False
    operand = 1 + torch.rand(256, 256, generator=torch.Generator().manual_seed(_SEED))
    expected = operand.double() @ operand.double()
    with onednn_products():
        return bool(((operand @ operand - expected).abs() <= 1e-5 * expected).all())


def timed_arms() -> dict[str, Callable[[Problem, Config], Outcome]]:
    """Those of `ARMS`, and those that are timed but not compared in memory."""
    more = {"torch_lce_onednn": torch_lce_onednn} if onednn_products_are_float32() else {}
    own = {"ours_joined": ours_joined, "ours_bfloat16": ours_bfloat16, "products": products}
    return ARMS | more | own


ARMS: dict[str, Callable[[Problem, Config], Outcome]] = {
    "ours": ours,
    "dense": dense,
    "torch_lce": torch_lce,
    "torch_lce_plus_bag": torch_lce_plus_bag,
}


def differences(config: Config) -> tuple[float, float]:
    """How far the other arms with our loss are from `dense`: the greatest relative difference of loss, and of
    gradients.

    Relative to the norm of the whole gradient.
    """
    problem = make_problem(config)
    expected = dense(problem, config)
    others = [ours(problem, config), torch_lce_plus_bag(problem, config)]
    loss_error, *gradient_errors = [
        max(float((other[part] - expected[part]).norm() / expected[part].norm()) for other in others)
        for part in range(3)
    ]
    return loss_error, max(gradient_errors)


def _fused_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, problem: Problem, config: Config) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=config.torch_chunk_rows or None)
    labels_N = problem.targets.labels_N
    return F.linear_cross_entropy(hidden_ND, weight_VD, labels_N, reduction="sum", options=options)


def _leaves(problem: Problem) -> tuple[Tensor, Tensor]:
    """The same storage as fresh leaves, so that each call makes its own gradients."""
    return problem.hidden_ND.detach().requires_grad_(), problem.weight_VD.detach().requires_grad_()


def _outcome(loss: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> Outcome:
    loss.backward()
    assert hidden_ND.grad is not None and weight_VD.grad is not None
    return loss.detach(), hidden_ND.grad, weight_VD.grad


def _as_matrices(problem: Problem) -> tuple[Tensor, Tensor]:
    """Ids and probabilities as [N, K]: here every row has as many."""
    num_rows = len(problem.hidden_ND)
    return problem.targets.ids.view(num_rows, -1), problem.targets.probabilities.view(num_rows, -1)


def _warm_up_config(config: Config) -> Config:
    """Sizes that are over in a moment, several chunks in each arm."""
    sizes = {name: min(size, getattr(config, name)) for name, size in _WARM_UP.items()}
    return dataclasses.replace(config, **sizes, chunk_bytes=4 * sizes["vocab_size"] * 40)


def _peak_of_arm(name: str, config: Config) -> int:
    """In a child: the arm's peak memory above its start."""
    use_threads(config.threads)
    small = _warm_up_config(config)
    ARMS[name](make_problem(small), small)
    problem = make_problem(config)
    return peak_bytes_above_start(lambda: ARMS[name](problem, config))
