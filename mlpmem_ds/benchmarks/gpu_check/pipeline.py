"""Steps of the GPU check: the front-ends, from text to an export that writes text.

Shape legend: B windows, S tokens.
"""

from __future__ import annotations

import json
import math
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlpmem_ds.benchmarks.gpu_check.made_up import (
    fresh,
    front_end,
    probed_front_end,
    write_base,
    write_corpus,
)
from mlpmem_ds.benchmarks.gpu_check.sizes import Sizes
from mlpmem_ds.benchmarks.gpu_check.steps import Context
from mlpmem_ds.core.log import read_events
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.maths.head_scores import label_log_probabilities
from mlpmem_ds.models.base_loading import load_base
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.stages.generation.exported_model import load_model, read_export
from mlpmem_ds.stages.training.metrics import read_metrics

_BATCH_WINDOWS = 16
_OUTSIDE_FORWARD = 0.10  # share of extraction's time
_MFU = {1: 0.45, 2: 0.45, 3: 0.40}
_DATA_WAIT = _IDLE = 0.03


def measure_extraction(context: Context) -> None:
    """Tokens a second of extract-keys, and the share of its time outside the forward pass."""
    sizes, root = context.sizes, fresh(context.work / "extract")
    base = write_base(sizes.extraction_base, root / "base")
    corpus = write_corpus(sizes.extraction_base, sizes.extraction_positions, root / "corpus")
    front_end(
        "extract-keys",
        *("--model", base, "--corpus", corpus, "--output", root / "keys"),
        *("--batch-windows", _BATCH_WINDOWS),
    )
    units = [event for event in read_events(root / "keys" / "log.jsonl") if event["event"] == "unit"]
    # By the clock, from the first unit's start to the last one's end: units may overlap.
    timed = [event for event in units if event["unit"] != "codec"]
    first = min(event["time"] - event["seconds"] for event in timed)
    seconds = max(event["time"] for event in timed) - first
    forward = _seconds_of_forward(base, corpus, context.device)
    context.report.speed("tokens_per_second", sizes.extraction_positions / seconds, "1/s")
    context.report.speed("forward_tokens_per_second", sizes.extraction_positions / forward, "1/s")
    context.report.speed("share_outside_forward", 1 - forward / seconds, "", at_most=_OUTSIDE_FORWARD)
    fresh(root)


@torch.no_grad()
def _seconds_of_forward(base: Path, corpus: Path, device: torch.device) -> float:
    """Of the model's body and its labels' log-probabilities over the same windows, nothing kept."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_base(str(base), dtype=dtype, device=device)
    weight_VD, bias_V = output_head(model)
    split = open_corpus(corpus)
    windows = split.windows()

    def read(at: int) -> torch.Tensor:
        batch = windows[at : at + _BATCH_WINDOWS]
        ids_BS = torch.from_numpy(
            np.stack([split.tokens(window.context_start, window.stop) for window in batch]).astype(np.int64)
        ).to(device)
        final_BSD = model.base_model(ids_BS, use_cache=False).last_hidden_state
        return label_log_probabilities(
            final_BSD.flatten(0, 1), weight_VD, ids_BS.flatten(), bias=bias_V, transform=None
        )

    read(0).sum().item()
    start = time.perf_counter()
    total = torch.zeros((), device=device)
    for at in range(0, len(windows), _BATCH_WINDOWS):
        total += read(at).sum()
    total.item()
    return time.perf_counter() - start


def measure_training(context: Context) -> None:
    """MFU, waiting for data, idle share and memory of a large memory's steps with each ZeRO stage."""
    sizes, root = context.sizes, fresh(context.work / "train")
    base = write_base(sizes.training_base, root / "base")
    corpus = write_corpus(sizes.training_base, sizes.training_positions, root / "corpus")
    keys, targets = root / "keys", root / "targets"
    front_end("extract-keys", "--model", base, "--corpus", corpus, "--output", keys)
    front_end("write-targets", "--keys", keys, "--output", targets, "--search", "exact", *_targets_of(sizes))
    for stage in (1, 2, 3):
        output = root / f"memory{stage}"
        (said,) = probed_front_end(
            root / f"reports{stage}",
            "train",
            *training_flags(sizes, stage, corpus, keys, targets, output),
            max_steps=sizes.training_steps,
        )
        _report_training(context, stage, output, said)
        fresh(output)
    fresh(root)


def _targets_of(sizes: Sizes) -> tuple[object, ...]:
    """As many entries a row as a text's 1,024 neighbours have."""
    return "--k", min(256, sizes.k), "--neighbour-perplexity", min(256, sizes.k) / 2


def training_flags(
    sizes: Sizes, stage: int, corpus: Path, keys: Path, targets: Path, output: Path
) -> tuple[object, ...]:
    """Of a training that is measured for `training_steps`."""
    return (
        *("--ds_config", ds_configs() / f"zero{stage}.json", "--corpus", corpus, "--output", output),
        *("--keys", keys, "--targets", targets, *sizes.training_memory),
        *("--batch-positions", sizes.training_rows, "--micro-batch-positions", sizes.training_rows),
        *("--epochs", 2 * sizes.training_steps * sizes.training_rows / sizes.training_positions),
        *("--validate-every", "none", "--log-every-steps", max(1, sizes.training_steps // 6)),
        *("--save-every-steps", 10**6),
    )


def _report_training(context: Context, stage: int, output: Path, said: dict[str, Any]) -> None:
    lines = [line for line in read_metrics(output) if "loss" in line]
    late = lines[len(lines) // 2 :]  # after the profiled steps
    report = context.report

    def median(name: str) -> float:
        return statistics.median(line.get(name) or math.nan for line in late)

    report.speed(f"mfu_zero{stage}", median("mfu"), "", at_least=_MFU[stage])
    report.speed(f"rows_per_second_zero{stage}", median("positions_per_second"), "1/s")
    report.speed(f"data_wait_zero{stage}", median("data_wait_share"), "", at_most=_DATA_WAIT)
    idle = math.nan if said["idle_share"] is None else said["idle_share"]
    report.speed(f"idle_zero{stage}", idle, "", at_most=_IDLE)
    report.speed(f"peak_memory_zero{stage}", said["peak_bytes"] / 1e9, "GB")
    report.fact(f"finite_loss_zero{stage}", math.isfinite(late[-1]["loss"] or math.nan), at_least=1)


def check_checkpoint(context: Context) -> None:
    """Text → corpus → keys → index → targets → a memory that is stopped and resumed → export."""
    sizes, root = context.sizes, fresh(context.work / "text")
    text = Path(sysconfig.get_path("stdlib"))
    corpus, base, keys, targets = (root / name for name in ("corpus", "base", "keys", "targets"))
    context_size = sizes.text_base.context
    front_end(
        "prepare-corpus",
        *("--input", text, "--include", "*.py", "--exclude", "site-packages", "dist-packages", "test"),
        *("--tokenizer", f"train:{sizes.text_vocab_size}", "--output", corpus),
        *("--block-size", context_size, "--stride", context_size, "--max-bytes", sizes.text_bytes),
        *("--tuning-fraction", 0.1),
    )
    write_base(sizes.text_base, base)
    front_end("extract-keys", "--model", base, "--corpus", corpus, "--output", keys)
    front_end("build-index", "--keys", keys, "--output", root / "index", "--num-shards", 2)
    front_end(
        "write-targets",
        *("--keys", keys, "--index", root / "index", "--output", targets, "--search", "ivf", "--nprobe", 4),
        *_targets_of(sizes),
    )
    words = (
        *("--ds_config", ds_configs() / "zero3.json", "--corpus", corpus, "--keys", keys),
        *("--targets", targets, "--model", base, "--output", root / "memory", "--num-blocks", 2),
        *("--epochs", 2, "--batch-positions", sizes.text_rows, "--log-every-steps", 1),
        *("--validation-positions", 2048),
    )
    front_end("train", *words, "--stop-after-seconds", 1e-3)
    stopped = [event["step"] for event in read_events(root / "memory" / "log.jsonl")
               if event["event"] == "stopped"]  # fmt: skip
    context.report.fact("stopped_at_step", stopped[-1] if stopped else 0, at_least=1)
    front_end("train", *words)
    losses = [line["loss"] for line in read_metrics(root / "memory") if "loss" in line]
    context.report.fact("steps_after_resume", len(losses) - stopped[-1], at_least=1)
    context.report.fact("loss_last_over_first", losses[-1] / losses[0], at_most=1)
    # It compares the export's logits with the checkpoint's, and fails if they differ.
    front_end(
        "convert-checkpoint",
        *("--checkpoint", root / "memory", "--model", base, "--output", fresh(context.work / "export")),
    )
    context.report.fact("has_export", (context.work / "export" / "config.json").is_file(), at_least=1)


def check_generation(context: Context) -> None:
    """Greedy text of the export: the same with a static cache as with a growing one.

    Raises:
        FileNotFoundError: the step `checkpoint` left no export.
    """
    export = context.work / "export"
    if not (export / "config.json").is_file():
        raise FileNotFoundError(f"{export}: the step `checkpoint` makes it, and must be done before")
    model: Any = load_model(str(export), device=context.device)
    _, tokenizer = read_export(str(export))
    ids_BS = tokenizer("def read(self, size):\n    return", return_tensors="pt")["input_ids"].to(model.device)
    count = context.sizes.new_tokens

    def generate(**settings: Any) -> torch.Tensor:
        generated: torch.Tensor = model.generate(
            ids_BS, attention_mask=torch.ones_like(ids_BS), do_sample=False,
            max_new_tokens=count, min_new_tokens=count, **settings,
        )  # fmt: skip
        return generated[0, ids_BS.shape[1] :]

    growing = generate()
    generate(cache_implementation="static")  # compiles
    start = time.perf_counter()
    static = generate(cache_implementation="static")
    static_list = static.tolist()
    seconds = time.perf_counter() - start
    agreed = sum(one == other for one, other in zip(growing.tolist(), static_list, strict=True))
    context.report.fact("generated", len(static_list), "tokens", at_least=count)
    context.report.fact("agreed_with_growing_cache", agreed / count, at_least=0.5)
    context.report.speed("static_tokens_per_second", count / seconds, "1/s")
    front_end("generate", "--model", export, "--prompt", "def read(self, ", "--max-new-tokens", count)
    (context.work / "generated.json").write_text(json.dumps(static_list), encoding="utf-8")
