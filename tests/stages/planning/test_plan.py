"""plan: bytes that the formats give, times that a finished run teaches, and messages that name the remedy."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.log import seconds_of_stage
from mlpmem_ds.core.manifest import CompleteStage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.trained_models import MemoryManifest, TrainingResult
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.shape import read_shape
from mlpmem_ds.stages.planning import plan, table
from mlpmem_ds.stages.planning.calibration import calibrate, read_run, sizes_of_run
from mlpmem_ds.stages.planning.cost_model import STAGES, Calibration, costs, seconds_of
from mlpmem_ds.stages.planning.counts import candidates, operations, owners_of_query, sent_bytes
from mlpmem_ds.stages.planning.workload import Machine

from ...manifests import make_provenance
from .conftest import CLUSTER, SHAPE, bytes_of, config


def test_bytes_follow_the_formats() -> None:
    found = plan.make_plan(config()).costs
    assert found["corpus"].bytes == 4 * 10**8  # uint32: more than 65,536 tokens
    assert found["keys"].bytes == (256 + 2 * 1536 + 4 + 4) * 10**8
    codes, centroids = (64 + 8) * 10**8, 25 * 32_768 * 256 * 4  # 24 shards, and the trained index
    assert found["index"].bytes == pytest.approx(codes + centroids, rel=0.01)
    memory = MemoryConfig(
        input_size=1536,
        hidden_size=1536,
        intermediate_size=6144,
        num_blocks=4,
        vocab_size=SHAPE["vocab_size"],
    )
    each = memory.num_parameters()
    assert found["memory"].bytes == each * (2 * 16 + 4)  # two checkpoints in float32, and the weights
    assert found["memory"].temporary_bytes == each * 16
    on_gpus = plan.make_plan(config(gpus=1)).costs["memory"]
    assert (on_gpus.bytes, on_gpus.temporary_bytes) == (each * (2 * 14 + 4), each * 14)
    assert (
        plan.make_plan(config(input_codec="none", codec="raw")).costs["keys"].bytes
        == (2 * 1536 + 4 + 4) * 10**8
    )
    exact, compact = (
        plan.make_plan(config(encoding=name)).costs["targets"].bytes for name in ("exact", "compact")
    )
    assert exact > compact > 100 * 10**8


def test_the_calibrated_run_is_planned_as_it_was(finished: Path) -> None:
    """Planned at its own size, a run costs what it cost."""
    positions = open_keys(finished / "keys").num_positions
    found = plan.make_plan(plan.Config(positions=positions, calibrate=finished, threads=1, search="ivf"))
    assert found.work.k == 20 and found.work.nprobe == 2 and found.work.num_shards == 2
    assert set(found.calibrated) == {"keys", "index", "targets"}
    assert found.costs["targets"].bytes == pytest.approx(bytes_of(finished / "targets"), rel=1e-6)
    assert found.costs["targets"].seconds == pytest.approx(seconds_of_stage(finished / "targets"), rel=1e-6)
    assert found.costs["index"].bytes == pytest.approx(
        bytes_of(finished / "index"), rel=0.25
    )  # mostly headers so small
    arrays = sum(path.stat().st_size for path in (finished / "keys").glob("*.npy"))
    assert found.costs["keys"].bytes == pytest.approx(arrays, rel=0.06)  # 128 bytes of header each
    assert found.work.parameters == read_shape(_model_of(finished)).parameters


def _model_of(root: Path) -> str:
    return json.loads((root / "keys" / "run.json").read_text())["config"]["model"]


def test_flags_overrule_the_run(finished: Path) -> None:
    found = plan.make_plan(
        plan.Config(positions=10**6, calibrate=finished, k=64, preset="gelu-18x768", epochs=2.0)
    )
    assert (found.work.k, found.work.epochs, found.work.memory.num_blocks) == (64, 2.0, 18)
    assert found.work.memory.input_size == found.work.width == 16
    assert found.work.factory == "IVF4096,PQ4"


def test_a_run_by_other_ranks_than_the_planned_ones_teaches_the_same_speed(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    one, two = (
        plan.make_plan(plan.Config(positions=10**6, calibrate=finished, ranks=ranks)).costs["keys"].seconds
        for ranks in (1, 2)
    )
    assert one == pytest.approx(two)
    run = read_run(finished)
    work = plan.make_plan(plan.Config(positions=10**6, calibrate=finished)).work
    machine = {"cores": 1, "gpu_flops": 1e12, "memory_bytes": 10**10, "disk_bytes": 10**10}
    alone, of_many = (
        calibrate(run, work, Machine(ranks=ranks, gpus=ranks, nodes=nodes, **machine), threads=1)
        for ranks, nodes in ((1, 1), (16, 2))
    )
    assert alone == of_many


def test_each_node_has_cores_of_its_own(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the speed of a run."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for flags in ({**SHAPE}, {"calibrate": finished}):
        of_two, of_four = (
            plan.make_plan(plan.Config(positions=10**9, ranks=ranks, nodes=nodes, **flags))
            for ranks, nodes in ((16, 2), (32, 4))
        )
        assert of_two.machine.cores == of_four.machine.cores == 8
        assert of_four.costs["keys"].seconds == pytest.approx(of_two.costs["keys"].seconds / 2)


def test_a_training_that_was_stopped_early_counts_as_long_as_it_was(finished: Path) -> None:
    run = read_run(finished)
    positions = run.keys.num_positions
    training = TrainingResult(steps=30, rows_per_step=positions // 10, selected_step=20, validations=())
    manifest = MemoryManifest(memory={}, provenance=make_provenance(epochs=8.0), training=training)
    unknown = dataclasses.replace(manifest, training=None)
    for found, epochs in ((manifest, 3.0), (unknown, 8.0)):
        memory = CompleteStage(
            root=finished, sha256="", inputs={}, config={}, files=run.keys.files, manifest=found
        )
        sizes = sizes_of_run(dataclasses.replace(run, memory=memory))
        assert sizes["epochs"] == pytest.approx(epochs, rel=0.02)


def test_the_perplexity_follows_a_small_k() -> None:
    small, given = (plan.make_plan(config(k=64, neighbour_perplexity=value)) for value in (None, 32.0))
    assert small.work == given.work and plan.make_plan(config(k=1024)).work.neighbour_perplexity == 100


def test_seconds_scale_with_ranks_calibration_and_size() -> None:
    work, machine = plan.make_plan(config()).work, plan.make_plan(config()).machine
    one = costs(work, machine)
    two = costs(work, dataclasses.replace(machine, ranks=2))
    slower = costs(work, machine, Calibration(seconds={"keys": 3.0, "index.train": 2.0}, target_bytes=0.5))
    for stage in ("corpus", "keys", "memory"):
        assert one[stage].seconds == pytest.approx(2 * two[stage].seconds)
    sent = 2 * sent_bytes(work, 2) / machine.network_rate + 2 * 10**8 * 1024 * 1e-8 / machine.cores
    assert two["targets"].seconds == pytest.approx((one["targets"].seconds + sent) / 2)
    assert two["index"].seconds < one["index"].seconds < 2 * two["index"].seconds  # one rank trains the code
    assert slower["keys"].seconds == pytest.approx(3 * one["keys"].seconds)
    trained = seconds_of("index", work, machine)["index.train"]
    assert slower["index"].seconds == pytest.approx(one["index"].seconds + trained)
    assert slower["targets"].bytes == pytest.approx(one["targets"].bytes / 2)
    longer = costs(dataclasses.replace(work, positions=2 * work.positions), machine)
    assert all(longer[stage].bytes >= one[stage].bytes for stage in STAGES)


def test_gpus_take_over_and_are_counted() -> None:
    without, found = plan.make_plan(config()), plan.make_plan(config(gpus=8, ranks=8))
    assert {name for name, cost in found.costs.items() if cost.gpu_hours} == {
        "keys",
        "index",
        "targets",
        "memory",
    }
    assert found.costs["keys"].seconds < without.costs["keys"].seconds / 100
    assert found.costs["keys"].gpu_hours == pytest.approx(8 * found.costs["keys"].seconds / 3600)
    assert any("not measurements" in line for line in found.warnings) and not any(
        "GPUs" in w for w in without.warnings
    )
    assert plan.make_plan(config(positions=10**6)).work.search == "ivf"
    assert plan.make_plan(config(positions=10**6, gpus=1)).work.search == "exact"  # a GPU is quick enough


def test_a_stage_takes_the_time_of_its_bytes_at_least() -> None:
    sizes = {"positions": 10**9, "gpus": 64, "ranks": 64, "threads": 2, "memory_gb": 1000.0}
    sizes["batch_positions"] = 1 << 20  # of so many GPUs; smaller ones send weights most of the time
    slow, quick = (plan.make_plan(config(**sizes, disk_gb_per_second=rate)) for rate in (0.5, 1e6))
    moved = slow.costs["keys"].bytes + slow.costs["corpus"].bytes
    assert slow.costs["keys"].seconds == pytest.approx(moved / 0.5e9)
    head = 1536 * 151_936
    operations = 2 * (2 * (1.5e9 - head) + head) * 1e9  # windows overlap by half, the head's rows do not
    assert quick.costs["keys"].seconds == pytest.approx(operations / (0.4 * 64 * 990e12))
    assert "at 0.5 GB/s of the disk (--disk-gb-per-second)" in table.render_table(slow)
    trained = quick.costs["memory"].seconds
    assert slow.costs["memory"].seconds > trained
    in_memory = (
        plan.make_plan(config(**sizes | {"memory_gb": 1e6}, disk_gb_per_second=0.5)).costs["memory"].seconds
    )
    assert (
        trained < in_memory < slow.costs["memory"].seconds / 4
    )  # else each of the five epochs reads everything
    assert not any("those of this machine" in line for line in slow.warnings)
    unsaid = "\n".join(plan.make_plan(config(gpus=8, threads=None)).warnings)
    assert "--threads and --memory-gb not given: this machine's are assumed" in unsaid


def test_where_a_time_cannot_be_planned_there_is_none_and_the_reason() -> None:
    small, large, beyond = (
        plan.make_plan(config(positions=count, **CLUSTER)) for count in (10**9, 10**10, 3 * 10**11)
    )
    assert small.seconds is not None and small.costs["targets"].limit is None
    cost = large.costs["targets"]
    assert cost.seconds is cost.gpu_hours is large.seconds is None
    assert cost.limit is not None and cost.limit.startswith(
        "not supported above 5.7e+09 positions on 32 GPUs"
    )
    assert cost.bytes > 0 and cost.num_files > 0 and cost.operations > 0
    text = table.render_table(large)
    assert "targets: not supported above 5.7e+09" in text and "not supported, see below" in text
    assert large.to_json()["seconds"] is None and large.costs["keys"].seconds is not None
    assert all("above 2e+11 positions" in (cost.limit or "") for cost in beyond.costs.values())
    on_cpus = plan.make_plan(config(positions=10**10, ranks=32, memory_gb=2000.0, disk_gb=1e5))
    assert on_cpus.costs["targets"].limit is None


def test_owners_of_lists_send_their_answers() -> None:
    """As many bytes in all at any number of ranks above that of the probes; none with one rank."""
    work = plan.make_plan(config(positions=10**8, **CLUSTER)).work
    assert sent_bytes(work, 1) == 0
    assert owners_of_query(work, 32) == pytest.approx(20.4, abs=0.1)
    each = 256 + 4 * 32 + 8 + 8 * 1024
    assert sent_bytes(work, 32) == pytest.approx(10**8 / 32 * 20.4 * each, rel=0.01)
    in_two_levels = dataclasses.replace(work, positions=5 * 10**9, factory="IVF262144,PQ64")
    assert owners_of_query(in_two_levels, 32) == pytest.approx(10.2, abs=0.1)
    slow, quick = (
        plan.make_plan(config(positions=10**8, **CLUSTER, network_gb_per_second=rate)).costs["targets"]
        for rate in (1.0, 100.0)
    )
    assert slow.seconds - quick.seconds == pytest.approx(sent_bytes(work, 32) * (1e-9 - 1e-11))


def test_ranks_on_cpus_hold_their_groups_of_lists() -> None:
    sizes = {"positions": 10**9, "search": "ivf", "memory_gb": 1000.0, "disk_gb": 1e5}
    one, eight, small = (
        plan.make_plan(config(**sizes | changes)).costs["targets"].rank_memory_bytes
        for changes in ({"ranks": 1}, {"ranks": 8}, {"ranks": 8, "memory_gb": 100.0})
    )
    answers = 8 * 1024 * 32768 * 16  # of 2^18 queries of all ranks, found for others and by others
    assert eight - one == pytest.approx(268 * 10**9 / 8 + answers, rel=0.01)
    assert small - one == pytest.approx(answers, rel=0.01)  # they stay in their mapped files


def test_a_query_is_compared_with_all_centroids_too() -> None:
    """At 5e9 keys probes are as many distances as a third of the candidates; they were left out once."""
    work = plan.make_plan(config(positions=4 * 10**9, **CLUSTER)).work
    assert work.factory.startswith("IVF262144")
    with_probes = operations("targets", work)
    assert with_probes == pytest.approx(2 * 256 * work.positions * (262_144 + candidates(work)), rel=1e-6)


def test_a_head_that_is_the_bases_is_neither_trained_nor_stored() -> None:
    base = {"parameters": 8e9, "width": 4096, "vocab_size": 128_256}
    own, frozen = (plan.make_plan(config(**base, **CLUSTER, head=head)) for head in ("own", "frozen"))
    head = 4096 * 128_256
    assert own.work.memory.num_parameters() - frozen.work.memory.num_parameters() == head
    assert own.costs["memory"].bytes - frozen.costs["memory"].bytes >= 16 * head
    saved = own.costs["memory"].operations - frozen.costs["memory"].operations
    assert saved == pytest.approx(2 * head * own.work.positions * own.work.epochs)
    with pytest.raises(UserError, match="the base's head reads 4,096 numbers, and the memory is 2,048 wide"):
        plan.make_plan(config(**base, preset="1b", head="frozen"))


def test_each_window_of_the_base_is_read_block_over_stride_times() -> None:
    twice, once = (plan.make_plan(config(stride=stride)).costs["keys"].seconds for stride in (512, 1024))
    assert once < 0.6 * twice


def test_the_shape_of_a_base_is_read_without_its_weights(base_dir: Path, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(base_dir).save_pretrained(tmp_path)  # the configuration alone
    shape = read_shape(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.width, shape.vocab_size) == (16, 300)
    found = plan.make_plan(plan.Config(positions=10**5, model=str(tmp_path)))
    assert found.work.parameters == shape.parameters and found.work.dim == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": 0}, "--positions must be at least 1 .*, not 0"),
        ({"gpus": -1}, "--gpus must be at least 0 .*, not -1"),
        ({"disk_gb_per_second": 0.0}, "--disk-gb-per-second must be above 0, not 0.0"),
        ({"epochs": 0.0}, "--epochs must be above 0 .*, not 0.0"),
        ({"neighbour_perplexity": 1.0}, "must be above 1"),
        ({"stride": 96, "block_size": 64}, "--block-size 64 must be a multiple of --stride 96"),
        ({"dim": 4096}, "--dim 4096 is not of a base of --width .*: leave it out"),
        ({"codec": "raw", "dim": 8}, "--codec raw keeps all of them: leave it out"),
        ({"k": 100_000}, "--k must be at least 1 and at most 65535, not 100000"),
        ({"k": 10, "neighbour_perplexity": 30.0}, "--neighbour-perplexity 30 must lie between 1 and --k 10"),
        ({"nodes": 8, "ranks": 2}, "--nodes 8 are more than the --ranks 2"),
        ({"disk_gb": 1e300}, "--disk-gb must be above 0 and at most"),
        ({"parameters": 1e308}, "--parameters must be at least 1 and at most"),
        ({"factory": "IVF99999999,Flat", "positions": 10**6}, "needs at least 99,999,999 keys"),
        ({"factory": "Flat"}, "must hold IVF"),
        ({"factory": "IVF16,PQ7"}, "does not fit"),
        ({"width": None}, "--width missing: give them, or --model"),
        ({"model": "/nowhere/at/all"}, "there is no such directory, .*check the path; give --parameters"),
        ({"calibrate": Path("nowhere")}, "name the directory of a finished run"),
    ],
)
def test_mistakes_name_the_remedy(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan.make_plan(config(**changes))


def test_a_directory_without_a_run_or_a_wrong_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no complete keys directory"):
        plan.make_plan(config(calibrate=tmp_path))
    for output, said in (
        (tmp_path, "is a directory: name a file"),
        (tmp_path / "missing" / "plan.json", "does not exist; make it first"),
    ):
        with pytest.raises(UserError, match=said):
            plan.run(config(output=output), World())
    assert not list(tmp_path.iterdir())


def test_planned_memory_is_that_of_the_process(finished: Path) -> None:
    """At toy size almost all of it is the process itself: the sum must not be far from it, nor fall with the
    size."""
    machine = Machine(ranks=1, cores=1, gpus=0, gpu_flops=0.0, memory_bytes=10**10, disk_bytes=10**10)
    work = plan.make_plan(plan.Config(positions=10**6, calibrate=finished, search="ivf")).work
    sizes = [
        [
            cost.rank_memory_bytes
            for cost in costs(dataclasses.replace(work, positions=count), machine).values()
        ]
        for count in (10**6, 10**7)
    ]
    assert (np.array(sizes[1]) >= np.array(sizes[0])).all() and min(sizes[0]) > 1.5e8


def test_keys_are_mapped_and_not_a_ranks_own() -> None:
    """A hundred times the positions, in lists as long: the same memory of a rank, and as much more on disk
    for a while."""
    large = plan.make_plan(config(positions=10**9, factory="IVF262144,PQ64", search="ivf")).costs["targets"]
    small = plan.make_plan(config(positions=10**7, factory="IVF2048,PQ64", search="ivf")).costs["targets"]
    assert (
        small.rank_memory_bytes == pytest.approx(large.rank_memory_bytes, rel=0.5)
        and large.rank_memory_bytes < 2e9
    )
    assert large.temporary_bytes == pytest.approx((256 + 4 + 4 + 4 + 4) * 10**9, rel=0.01)
    exact = plan.make_plan(config(positions=10**5, search="exact")).costs["targets"]
    assert not exact.temporary_bytes
    words = "\n".join(plan.make_plan(config(positions=10**9, disk_gb=10.0, search="ivf")).warnings)
    assert "272 GB more while they are written (elsewhere: write_targets --lists)" in words


def test_small_batches_are_bound_by_the_weights_that_are_sent() -> None:
    """ZeRO 2: after each step 2 P bytes a GPU; its 4 P of gradients where the backward does not hide them."""
    sizes = {"positions": 10**9, "gpus": 16, "ranks": 16, "epochs": 1.0, "disk_gb_per_second": 1e6}
    seconds = {
        (nodes, batch): plan.make_plan(config(**sizes, nodes=nodes, batch_positions=batch))
        .costs["memory"]
        .seconds
        for nodes in (1, 2)
        for batch in (1 << 13, 1 << 20)
    }
    memory = plan.make_plan(config(**sizes)).work.memory
    computed = 6 * memory.num_matrix_parameters() * 10**9 / (0.35 * 16 * 990e12)
    each = 10**9 / 2**20 * memory.num_parameters()
    assert seconds[2, 1 << 20] == pytest.approx(computed + 2 * each / 25e9)
    assert seconds[1, 1 << 20] == pytest.approx(computed + 2 * each / 2e11)
    hidden = computed * 2 / 3
    assert seconds[2, 1 << 13] == pytest.approx(computed + 128 * 6 * each / 25e9 - hidden)
    alone = plan.make_plan(config(**sizes | {"gpus": 1, "ranks": 1}, batch_positions=1 << 13))
    assert alone.costs["memory"].seconds == pytest.approx(16 * computed)  # nothing is sent


def test_a_training_without_stored_inputs_says_what_the_base_costs() -> None:
    base = {"parameters": 8e9, "width": 4096, "vocab_size": 128_256, "preset": "1b"}
    base["batch_positions"] = 1 << 20
    stored, online = (
        plan.make_plan(config(**base, **CLUSTER, input_codec=codec)) for codec in ("bf16", "none")
    )
    assert online.costs["memory"].seconds > 3 * stored.costs["memory"].seconds
    assert online.costs["memory"].rank_gpu_bytes > stored.costs["memory"].rank_gpu_bytes + 15e9


def test_a_price_follows_the_gpu_hours_and_ranks_their_nodes() -> None:
    sizes = {"gpus": 16, "ranks": 16, "memory_gb": 100.0}
    unsaid, dear = (plan.make_plan(config(**sizes, price_per_gpu_hour=price)) for price in (None, 2.5))
    assert unsaid.to_json()["price"] is None
    told = dear.to_json()
    assert told["price"] == pytest.approx(2.5 * told["gpu_hours"])
    assert told["price"] == pytest.approx(sum(stage["price"] for stage in told["stages"]))
    small = {"positions": 10**10, "input_codec": "none", **sizes, "memory_gb": 16.0}
    together, spread = (plan.make_plan(config(**small, nodes=nodes)).warnings for nodes in (1, 16))
    assert any("16 ranks of keys need" in line and "(--nodes)" in line for line in together)
    assert not any("ranks of keys need" in line for line in spread)
