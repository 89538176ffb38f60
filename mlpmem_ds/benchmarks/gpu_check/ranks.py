"""Steps of the GPU check with a rank on each GPU: each uses its own, and the bytes are those of one rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlpmem_ds.benchmarks.gpu_check.made_up import fresh, probed_front_end, write_base, write_corpus
from mlpmem_ds.benchmarks.gpu_check.steps import Context
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.stages.training.metrics import read_metrics

_LOSS_DIFFERENCE = 0.02  # of the last step's, relative: sums of gradients are rounded in another order


def check_keys(context: Context) -> None:
    """extract-keys over all ranks and over one."""
    sizes, root = context.sizes, fresh(context.work / "ranks")
    base = write_base(sizes.ranks_base, root / "base")
    corpus = write_corpus(sizes.ranks_base, sizes.ranks_positions, root / "corpus")
    unit = sizes.ranks_positions // (4 * context.num_gpus)
    unit = max(1, unit // sizes.ranks_base.context) * sizes.ranks_base.context
    _compare(context, "keys", "extract-keys", "--model", base, "--corpus", corpus, "--unit-positions", unit)


def check_index(context: Context) -> None:
    """build-index over all ranks and over one."""
    root = _ready(context, "keys")
    shards = context.num_gpus
    _compare(context, "index", "build-index", "--keys", root / "keys", "--num-shards", shards)


def check_targets(context: Context) -> None:
    """write-targets through the index, over all ranks and over one."""
    root, sizes = _ready(context, "index"), context.sizes
    block = sizes.ranks_base.context
    shard = max(1, sizes.ranks_positions // (2 * context.num_gpus) // block) * block
    k = min(256, sizes.k)
    _compare(
        context,
        "targets",
        "write-targets",
        *("--keys", root / "keys", "--index", root / "index", "--search", "ivf", "--nprobe", 4),
        *("--k", k, "--neighbour-perplexity", k / 2, "--shard-positions", shard),
    )


def check_training(context: Context) -> None:
    """train with each ZeRO stage over all ranks, and with stage 1 on one rank: the same losses."""
    root, sizes = _ready(context, "targets"), context.sizes
    batch = sizes.ranks_positions // (2 * sizes.ranks_steps) // context.num_gpus * context.num_gpus
    losses = {}
    for stage, ranks in ((1, None), (1, context.num_gpus), (2, context.num_gpus), (3, context.num_gpus)):
        name = f"zero{stage}" if ranks else "one"
        output = root / f"memory_{name}"
        said = probed_front_end(
            root / f"reports_{name}",
            "train",
            *("--ds_config", ds_configs() / f"zero{stage}.json", "--corpus", root / "corpus"),
            *("--keys", root / "keys", "--targets", root / "targets", "--output", output),
            *("--num-blocks", 2, "--epochs", 1, "--batch-positions", batch),
            *("--validate-every", "none", "--log-every-steps", 1, "--save-every-steps", 10**6),
            ranks=ranks,
            max_steps=sizes.ranks_steps,
        )
        _report_gpus(context, name, said)
        losses[name] = [line["loss"] for line in read_metrics(output) if "loss" in line][-1] or math.nan
    for name in ("zero1", "zero2", "zero3"):
        difference = abs(losses[name] - losses["one"]) / losses["one"]
        context.report.fact(f"loss_difference_{name}", difference, at_most=_LOSS_DIFFERENCE)


def _ready(context: Context, needed: str) -> Path:
    """The directory of these steps.

    Raises:
        FileNotFoundError: an earlier step has not left what this one reads.
    """
    root = context.work / "ranks"
    if not (root / needed / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{root / needed}: the step `{needed}_of_ranks` makes it, and must be done before"
        )
    return root


def _compare(context: Context, name: str, command: str, *words: object) -> None:
    """Run a stage over all ranks (into `name`) and over one; a manifest has the checksums of all files."""
    root = context.work / "ranks"
    said = probed_front_end(
        root / f"reports_{name}", command, *words, "--output", fresh(root / name), ranks=context.num_gpus
    )
    _report_gpus(context, name, said)
    alone = fresh(root / f"{name}_of_one")
    probed_front_end(root / f"reports_{name}_of_one", command, *words, "--output", alone)
    same = (alone / "manifest.json").read_bytes() == (root / name / "manifest.json").read_bytes()
    context.report.fact(f"same_{name}_as_one_rank", same, at_least=1)
    fresh(alone)


def _report_gpus(context: Context, name: str, said: Sequence[dict[str, Any]]) -> None:
    """Each rank has used the GPU of its own number, or none."""
    wrong = sum(any(gpu != rank for gpu in one["gpus"]) for rank, one in enumerate(said))
    context.report.fact(f"ranks_on_other_gpus_{name}", wrong, at_most=0)
    if not context.sizes.is_rehearsal:
        idle = sum(not one["gpus"] for one in said)
        context.report.fact(f"ranks_without_a_gpu_{name}", idle, at_most=len(said) // 2)
