"""Benchmark `train`: sparse targets as read from disk → **one optimizer step of the memory**, compared with
the published loop.

ours        what `stages.train` does: batch in CSR, chunked sparse loss in the forward of the head, ZeRO
            engine with fused AdamW. bfloat16 products by ds_configs/zero1.json; ours_fp32 the same in float32
            by ds_configs/cpu.json.
published   what the published loop (Binn0/MLPMemory, train_mlpmem_offline.py and utils/cal_loss.py) does,
            written anew: a Python loop that makes a dense row of each target, full logits, the rows that are
            not padding selected from them by a mask (a copy, whose backward adds into zeros one row after
            another), log_softmax + kl_div + cross_entropy, torch's plain AdamW, clipping, autograd's anomaly
            detection on. Its dropout is left out.
repaired    the same without anomaly detection and without the selection, and with one vectorized scatter for
            the targets.

All have the same network, initial weights and batch; published and repaired are measured in float32 and,
`_bf16`, under bfloat16 autocast. The ratios take the faster of each pair; `…_published_float32_…` compares
with the published loop in float32, as it runs where nothing asks for another. A step starts from arrays in
memory: reading is left out on both sides. `outside_matmul_share` is the share of a step's processor time (on
a GPU: device time) that is not in matrix products; `bound_over_…` is what `cpu_speed_over_…` would be if that
share were 0: no exact step can be faster on this processor.

With a GPU also: model FLOPs utilization and peak memory of a step of a larger preset.

Shape legend: N rows, D input size, V vocabulary, E entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from mlpmem_ds.benchmarks.common import (
    Report,
    Row,
    check_output,
    interleave,
    median_of,
    row_of,
    timing_rows,
    use_threads,
)
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.config import resolve_ds_config
from mlpmem_ds.engines.deepspeed.engine import AdamWSettings, Engine, build_engine
from mlpmem_ds.engines.deepspeed.process_group import set_up_distributed
from mlpmem_ds.engines.device_peak import peak_of
from mlpmem_ds.maths.sparse_loss import TargetBatch
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import PRESETS, MemoryConfig
from mlpmem_ds.models.objective import MemoryWithLoss
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.training.loop import max_memory

_SEED = 1
_ALPHA, _LEARNING_RATE, _CLIPPING = 0.5, 1e-4, 1.0
_MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::", "aten::mkldnn_")
_GPU_STEPS = 5
_PADDING = -10_000  # the number that fills the published loop's padded rows


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """A training step: ours, and the published loop as shipped and repaired, on the identical network and
    batch.

    The default sizes take about 3 minutes and 6 GB on two cores.
    """

    example: ClassVar[str] = "python tools/bench.py train --output train.json"

    output: Path = option("JSON file to write")
    rows: int = option("positions in a step", 1024, at_least=1)
    width: int = option("numbers in an input and in a hidden state", 256, at_least=1)
    num_blocks: int = option("residual blocks of the memory", 6, at_least=1)
    vocab_sizes: tuple[int, ...] = option("vocabularies, one after another", (8192, 50257), at_least=1)
    entries: int = option("teacher entries of each row", 64, at_least=1)
    runs: int = option("timed steps of each arm", 3, at_least=1)
    threads: int | None = shared_flags.threads()
    gpu_preset: str = option("memory whose step is measured where there is a GPU", "1b")
    gpu_rows: int = option("positions in that step", 16384, at_least=1)

    def check(self) -> None:
        if self.entries > min(self.vocab_sizes):
            raise UserError(
                f"--entries {self.entries} distinct ids do not fit in --vocab-sizes {min(self.vocab_sizes)}"
            )
        if self.gpu_preset not in PRESETS:
            raise UserError(f"--gpu-preset {self.gpu_preset!r} is none of {', '.join(PRESETS)}")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A step's rows in memory."""

    inputs_ND: Tensor
    labels_N: Tensor
    rows: SparseRows


def run(config: Config, world: World) -> None:
    check_output(config.output)
    use_threads(config.threads)
    set_up_distributed(world)
    report = Report("train", config)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for vocab_size in config.vocab_sizes:
        measured = measure(config, vocab_size, world)
        rows += measured
        ratios |= ratios_of(measured, vocab_size)
    if torch.cuda.is_available():
        measured = measure_large_step(config, world)
        rows += measured
        ratios["mfu_large_step"] = median_of(measured, f"ours {config.gpu_preset}", "mfu")
    report.publish(config.output, rows, ratios)


def measure(config: Config, vocab_size: int, world: World) -> list[Row]:
    """Rows of all arms at one vocabulary; the arms are called `NAME vV`."""
    memory, batch = memory_config(config, vocab_size), make_batch(config, vocab_size)
    steps = {f"{name} v{vocab_size}": step for name, step in make_steps(memory, batch, world).items()}
    for step in steps.values():
        step()  # warms up
    rows = timing_rows(interleave(steps, config.runs))
    mine = f"ours v{vocab_size}"
    rows.append(row_of(mine, "outside_matmul_share", "1", [share_outside_products(steps[mine])]))
    return rows


def ratios_of(rows: Sequence[Row], vocab_size: int) -> dict[str, float]:
    """How many times faster ours is by the clock, and (`cpu_…`) in processor time; the faster of each pair of
    dtypes."""

    def fastest(arms: Sequence[str], metric: str) -> float:
        return min(median_of(rows, f"{arm} v{vocab_size}", metric) for arm in arms)

    share = median_of(rows, f"ours v{vocab_size}", "outside_matmul_share")
    seconds_of_products = (1 - share) * median_of(rows, f"ours v{vocab_size}", "cpu_seconds")
    return (
        {
            f"{prefix}speed_over_{other}_v{vocab_size}": (
                fastest([other, f"{other}_bf16"], metric) / fastest(["ours", "ours_fp32"], metric)
            )
            for other in ("published", "repaired")
            for prefix, metric in (("", "wall_seconds"), ("cpu_", "cpu_seconds"))
        }
        | {
            f"speed_over_published_float32_v{vocab_size}": (
                fastest(["published"], "wall_seconds") / fastest(["ours", "ours_fp32"], "wall_seconds")
            ),
            f"outside_matmul_share_v{vocab_size}": share,
        }
        | {
            f"bound_over_{other}_v{vocab_size}": (
                fastest([other, f"{other}_bf16"], "cpu_seconds") / seconds_of_products
            )
            for other in ("published", "repaired")
        }
    )


def memory_config(config: Config, vocab_size: int) -> MemoryConfig:
    return MemoryConfig(
        input_size=config.width,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_blocks=config.num_blocks,
        vocab_size=vocab_size,
    )


def make_batch(config: Config, vocab_size: int) -> Batch:
    """Random inputs; `entries` distinct ascending ids a row, as target shards hold them."""
    generator = torch.Generator().manual_seed(_SEED)
    ids = [
        torch.randperm(vocab_size, generator=generator)[: config.entries].sort().values.clone()
        for _ in range(config.rows)
    ]
    logits = 2 * torch.randn(config.rows, config.entries, generator=generator)
    return Batch(
        inputs_ND=torch.randn(config.rows, config.width, generator=generator),
        labels_N=torch.randint(vocab_size, (config.rows,), generator=generator),
        rows=SparseRows.from_counts(
            np.full(config.rows, config.entries),
            torch.cat(ids).numpy(),
            logits.softmax(1).reshape(-1).numpy(),
        ),
    )


def make_steps(memory: MemoryConfig, batch: Batch, world: World) -> dict[str, Callable[[], float]]:
    """Name → one step of that arm, which gives its loss. All start from the same weights."""
    steps: dict[str, Callable[[], float]] = {}
    for name, file in (("ours", "zero1.json"), ("ours_fp32", "cpu.json")):
        engine = make_engine(memory, file, len(batch.labels_N), world)
        steps[name] = partial(step_of_ours, engine, batch)
    for name, collate, as_shipped in (
        ("published", collate_row_by_row, True),
        ("repaired", collate_at_once, False),
    ):
        for suffix, autocast in (("", False), ("_bf16", True)):
            steps[name + suffix] = make_plain_step(
                memory, batch, collate=collate, autocast=autocast, as_shipped=as_shipped
            )
    return steps


def make_engine(memory: MemoryConfig, file: str, rows: int, world: World) -> Engine:
    ds_config = resolve_ds_config(
        ds_configs() / file,
        batch=rows,
        batch_flag="--rows",
        world_size=world.size,
        max_micro_batch=rows,
        gradient_clipping=_CLIPPING,
    )
    return build_engine(
        partial(MemoryWithLoss, memory, alpha=_ALPHA),
        config=ds_config,
        settings=AdamWSettings(),
        seed=_SEED,
        world=world,
    )


def step_of_ours(engine: Engine, batch: Batch) -> float:
    targets = TargetBatch.from_rows(batch.rows, batch.labels_N.numpy())
    arguments = batch.inputs_ND.to(engine.device, engine.dtype), targets.to(engine.device)
    return float(engine.train_step([arguments], _LEARNING_RATE)[0][0])


def make_plain_step(
    memory: MemoryConfig,
    batch: Batch,
    *,
    collate: Callable[[Batch, int], Tensor],
    autocast: bool,
    as_shipped: bool,
) -> Callable[[], float]:
    """The published loop's step; `as_shipped` with anomaly detection and the selection of rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(_SEED)
    model = Memory(memory).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> float:
        targets_NV = collate(batch, memory.vocab_size).to(device)
        labels_N = batch.labels_N.to(device)
        inputs_ND = batch.inputs_ND.to(device)
        with torch.autograd.set_detect_anomaly(as_shipped):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits_NV = model.head(model(inputs_ND))
            logits_NV = logits_NV.float()
            if as_shipped:
                logits_NV = logits_NV[torch.any(inputs_ND != _PADDING, dim=-1)]
            kl = F.kl_div(F.log_softmax(logits_NV, dim=-1), targets_NV, reduction="batchmean")
            loss = _ALPHA * kl + (1 - _ALPHA) * F.cross_entropy(logits_NV, labels_N)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def collate_row_by_row(batch: Batch, vocab_size: int) -> Tensor:
    """[N, V]: a dense row at a time, then stacked."""
    rows = []
    for row in range(len(batch.labels_N)):
        entries = slice(batch.rows.offsets[row], batch.rows.offsets[row + 1])
        dense_V = torch.zeros(vocab_size)
        dense_V[torch.tensor(batch.rows.ids[entries])] = torch.tensor(batch.rows.probabilities[entries])
        rows.append(dense_V)
    return torch.stack(rows)


def collate_at_once(batch: Batch, vocab_size: int) -> Tensor:
    """[N, V] by one scatter."""
    dense_NV = torch.zeros(len(batch.labels_N), vocab_size)
    ids_E, teacher_E = torch.from_numpy(batch.rows.ids), torch.from_numpy(batch.rows.probabilities)
    dense_NV[torch.from_numpy(batch.rows.row_of_E), ids_E] = teacher_E
    return dense_NV


def share_outside_products(step: Callable[[], Any]) -> float:
    """The share of a step's own time in operators (device time on a GPU) that is not matrix products'."""
    is_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]) as profiler:
        step()
    total = products = 0.0
    for event in profiler.key_averages():
        time = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        total += time
        products += time if event.key.startswith(_MATRIX_PRODUCTS) else 0.0
    return 1 - products / total if total else math.nan


def measure_large_step(config: Config, world: World) -> list[Row]:
    """On a GPU: utilization of the measured peak, and most memory, of steps of a large memory with ZeRO-1."""
    memory = PRESETS[config.gpu_preset](32_000)
    engine = make_engine(memory, "zero1.json", config.gpu_rows, world)
    small = make_batch(
        Config(output=config.output, rows=config.gpu_rows, width=memory.hidden_size, entries=config.entries),
        memory.vocab_size,
    )
    step = partial(step_of_ours, engine, small)
    step()
    torch.cuda.reset_peak_memory_stats()
    seconds = [timing.wall for timing in interleave({"step": step}, _GPU_STEPS)["step"]]
    peak = peak_of(engine.device, engine.dtype)
    flops = 6.0 * memory.num_matrix_parameters() * config.gpu_rows
    arm = f"ours {config.gpu_preset}"
    return [
        row_of(arm, "mfu", f"share of {peak.source}", [flops / second / peak.flops for second in seconds]),
        row_of(arm, "peak_memory", "B", [max_memory(engine.device)]),
        row_of(arm, "wall_seconds", "s", seconds),
    ]
