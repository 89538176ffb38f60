"""Benchmark `loss`, rows of a CUDA device: the head's loss at a large model's size, the mixture of two
models' logits.

gpu_loss              `maths.sparse_loss`, bfloat16, forward and backward with K soft targets (a Triton kernel
                      a chunk).
gpu_matmuls           its three matrix products alone, by cuBLAS: no loss that makes both gradients can be
                      faster.
gpu_mixture           `mixture_on_device`: two Triton launches.
gpu_mixture_eager     log_softmax of both, two additions, logaddexp: what it replaces.

Figures of others for (4096, 4096, 128256), hard labels, H200, from their repositories: Liger-Kernel 141 ms
(Triton), 18.06 (its CuTe kernel), QuACK 17.33.

Shape legend: M rows, D width, V vocabulary, K teacher entries a row.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mlpmem_ds.benchmarks.common import Row, row_of
from mlpmem_ds.maths.sparse_loss import TargetBatch, sparse_loss
from mlpmem_ds.models.mixture_on_device import mixture_on_device


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The loss's M, D, V, K, and the mixture's batch and vocabulary."""

    rows: int = 4096
    width: int = 4096
    vocab_size: int = 128256
    entries: int = 64
    mixture_batch: int = 64
    mixture_vocab_size: int = 152064


def gpu_rows(device: str, *, runs: int, sizes: Sizes | None = None) -> tuple[list[Row], dict[str, float]]:
    """Rows (seconds of the device, bytes) and ratios; on "cpu" for tests of the arms at toy sizes."""
    sizes = sizes or Sizes()
    rows, ratios = [], {}
    for make_arms in (loss_arms, _mixture_arms):
        arms = make_arms(device, sizes)
        for arm in arms.values():  # compile, choose algorithms
            arm()
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(max(runs, 2)):
            for name, arm in arms.items():
                seconds[name].append(seconds_on(device, arm))
        rows += [row_of(name, "device_seconds", "s", values) for name, values in seconds.items()]
        ours, other = (statistics.median(values) for values in seconds.values())
        ratios["gpu_loss_over_matmuls" if make_arms is loss_arms else "gpu_mixture_over_eager"] = ours / other
        if device == "cuda" and make_arms is loss_arms:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            arms["gpu_loss"]()
            peak = torch.cuda.max_memory_allocated() - before
            rows.append(row_of("gpu_loss", "peak_memory_above_start", "B", [peak]))
    return rows, ratios


def loss_arms(device: str, sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """Forward and backward of the loss, and its three matrix products alone."""
    generator = torch.Generator(device=device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_MD = normal(sizes.rows, sizes.width).bfloat16().requires_grad_()
    weight_VD = (normal(sizes.vocab_size, sizes.width) / math.sqrt(sizes.width)).bfloat16().requires_grad_()
    steps_MK = torch.randint(
        1,
        max(2, sizes.vocab_size // sizes.entries),
        (sizes.rows, sizes.entries),
        generator=generator,
        device=device,
    )
    targets = TargetBatch(
        offsets_N1=torch.arange(sizes.rows + 1) * sizes.entries,
        ids=(steps_MK.cumsum(1) - 1).reshape(-1),
        probabilities=normal(sizes.rows, sizes.entries).softmax(1).reshape(-1),
        labels_N=torch.randint(sizes.vocab_size, (sizes.rows,), generator=generator, device=device),
    )
    logits_MV = torch.empty(sizes.rows, sizes.vocab_size, dtype=torch.bfloat16, device=device)

    def loss() -> None:
        hidden_MD.grad = weight_VD.grad = None
        total, _ = sparse_loss(hidden_MD, weight_VD, targets, alpha=0.5)
        total.backward()

    @torch.no_grad()
    def matmuls() -> None:
        torch.mm(hidden_MD, weight_VD.t(), out=logits_MV)
        torch.mm(logits_MV, weight_VD)
        torch.mm(logits_MV.t(), hidden_MD)

    return {"gpu_loss": loss, "gpu_matmuls": matmuls}


def _mixture_arms(device: str, sizes: Sizes) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator(device=device).manual_seed(2)
    shape = (2, sizes.mixture_batch, sizes.mixture_vocab_size)
    base, memory = torch.randn(shape, generator=generator, device=device).bfloat16()
    return {
        "gpu_mixture": lambda: mixture_on_device(base, memory, 0.25),
        "gpu_mixture_eager": lambda: torch.logaddexp(
            base.float().log_softmax(-1) + math.log(0.75), memory.float().log_softmax(-1) + math.log(0.25)
        ),
    }


def seconds_on(device: str, arm: Callable[[], Any]) -> float:
    """Seconds of the device for one call; on "cpu" those of the clock."""
    if device != "cuda":
        start = time.perf_counter()
        arm()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    arm()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000
