"""Warnings of a plan: what does not fit, what is slow, and what was assumed, each with a remedy."""

from __future__ import annotations

from mlpmem_ds.stages.planning import plan

from .conftest import config


def test_what_does_not_fit_is_said_with_a_remedy() -> None:
    fits = plan.make_plan(config(memory_gb=1000.0, disk_gb=10_000.0))
    assert not fits.warnings
    words = "\n".join(plan.make_plan(config(memory_gb=4.0, disk_gb=10.0, ranks=2)).warnings)
    assert "targets need" in words and "fewer ranks a node" in words and "the disk has 10 GB" in words
    assert plan.make_plan(config(memory_gb=4.0)).work.factory.endswith("PQ16")


def test_the_checkpoint_that_is_saved_before_an_older_one_goes_needs_disk() -> None:
    flags = {"positions": 10**6, "search": "exact", "memory_gb": 1000.0}
    left = sum(cost.bytes for cost in plan.make_plan(config(**flags)).costs.values())
    (said,) = plan.make_plan(config(**flags, disk_gb=1.05 * left / 1e9)).warnings
    assert "the training needs" in said and "while it saves a checkpoint" in said
    assert not plan.make_plan(config(**flags, disk_gb=2 * left / 1e9)).warnings


def test_a_base_or_a_memory_that_a_gpu_does_not_hold_is_said_with_a_remedy() -> None:
    base = {"parameters": 70e9, "width": 8192, "vocab_size": 128_256}
    flags = {"positions": 10**9, **base, "memory_gb": 2000.0, "disk_gb": 1e6, "threads": 8}
    (keys,) = plan.make_plan(plan.Config(**flags, gpus=8, ranks=8)).warnings[:1]
    assert keys.startswith(
        "a rank of keys holds 140 GB on its GPU, and 8 GPUs of 80 GB for 8 ranks have 80 GB"
    )
    assert "--device-map auto" in keys and "--gpu-memory-gb" in keys
    for fits in ({"gpu_memory_gb": 141.0, "ranks": 8}, {"ranks": 1}):
        found = plan.make_plan(plan.Config(**flags, gpus=8, **fits))
        assert not any("on its GPU" in line for line in found.warnings)
    online = plan.make_plan(plan.Config(**flags, gpus=8, ranks=8, input_codec="none"))
    assert any(line.startswith("a rank of memory holds") for line in online.warnings)
    assert online.costs["keys"].rank_memory_bytes < 10e9


def test_a_rank_has_one_gpu() -> None:
    flags = {"positions": 10**9, "memory_gb": 2000.0, "disk_gb": 1e5}
    unsaid, said, few = (plan.make_plan(config(**flags, gpus=8, ranks=ranks)) for ranks in (None, 8, 2))
    assert unsaid == said and unsaid.machine.ranks == 8
    assert not any("give --ranks" in line for line in unsaid.warnings)
    (line,) = [line for line in few.warnings if "give --ranks" in line]
    assert line.startswith("8 GPUs and --ranks 2: a rank uses one GPU") and "--device-map auto" in line
    assert line.endswith("give --ranks 8")
    without = plan.make_plan(config(**flags))
    assert without.machine.ranks == 1 and not without.warnings


def test_more_gpus_than_a_node_has_are_pointed_out() -> None:
    flags = {
        "positions": 10**9,
        "parameters": 1e9,
        "width": 2048,
        "vocab_size": 50000,
        "ranks": 256,
        "gpus": 256,
    }
    (said,) = [line for line in plan.make_plan(plan.Config(**flags)).warnings if "give --nodes" in line]
    assert said.startswith("256 GPUs on 1 node: few nodes have more than 16, and")
    spread = plan.make_plan(plan.Config(**flags, nodes=32))
    assert not any("give --nodes" in line for line in spread.warnings)
    assert spread.costs["memory"].num_files > plan.make_plan(plan.Config(**flags)).work.keep_checkpoints * 256


def test_steps_that_send_for_longer_than_they_compute_are_pointed_out() -> None:
    sizes = {"positions": 10**9, "gpus": 16, "ranks": 16, "epochs": 1.0, "disk_gb_per_second": 1e6}
    small, large = (
        "\n".join(plan.make_plan(config(**sizes, nodes=2, batch_positions=batch)).warnings)
        for batch in (1 << 13, 1 << 20)
    )
    assert "steps of 8,192 positions on 16 GPUs send" in small and "--batch-positions of 8,192 a GPU" in small
    assert "positions on 16 GPUs send" not in large
