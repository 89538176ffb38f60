"""Of a calibrated run's sizes a plan takes those that hold for its own text and base too, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.index.factory import choose_num_shards
from mlpmem_ds.stages.planning import plan
from mlpmem_ds.stages.planning.sizes import planned_workload
from mlpmem_ds.stages.planning.workload import Machine, Workload

MACHINE = Machine(ranks=1, cores=2, gpus=0, gpu_flops=0.0, memory_bytes=10**10, disk_bytes=10**12)
POSITIONS = 200_000
RUN: dict[str, Any] = {
    "positions": POSITIONS,
    "parameters": 10**6,
    "width": 512,
    "vocab_size": 4096,
    "input_layers": 1,
    "block_size": 256,
    "stride": 128,
    "dim": 64,
    "codec": "int8",
    "input_codec": "int8",
    "unit_positions": 1000,
    "factory": "IVF256,PQ16",
    "num_shards": 5,
    "search": "ivf",
    "nprobe": 8,
    "k": 64,
    "neighbour_perplexity": 9.0,
    "encoding": "compact",
    "shard_positions": 2000,
    "memory": MemoryConfig(
        input_size=512, hidden_size=512, intermediate_size=640, num_blocks=2, vocab_size=4096
    ).to_dict(),
}
LARGE = {"width": 4096, "vocab_size": 128_256, "parameters": 7e9}


def planned(run_sizes: dict[str, Any] = RUN, **flags: Any) -> Workload:
    config = plan.Config(**{"positions": POSITIONS, "calibrate": Path("run"), **flags})
    return planned_workload(config, run_sizes, MACHINE)


def test_units_and_shards_are_the_runs_at_its_own_size_alone() -> None:
    own, large = planned(), planned(positions=10**9)
    assert (own.num_shards, own.unit_positions, own.shard_positions) == (5, 1000, 2000)
    assert large.num_shards == choose_num_shards(10**9, large.num_lists) > 10
    assert large.unit_positions > 1000 and large.shard_positions > 2000
    assert planned(positions=10**9, num_shards=7).num_shards == 7
    assert planned(factory="IVF1024,PQ16").num_shards == choose_num_shards(POSITIONS, 1024) != 5


def test_a_calibrated_plan_has_the_shards_that_build_index_chooses(finished: Path) -> None:
    work = plan.make_plan(plan.Config(positions=10**9, calibrate=finished)).work
    assert work.num_shards == choose_num_shards(10**9, work.num_lists)


@pytest.mark.parametrize("preset", [None, "gelu-18x768"])
def test_another_base_has_keys_and_a_memory_of_its_own(preset: str | None) -> None:
    found, alone = (planned(sizes, **LARGE, preset=preset, k=64) for sizes in (RUN, {}))
    assert (found.dim, found.memory) == (256, alone.memory)
    assert (found.width, found.vocab_size, found.parameters) == (4096, 128_256, 7 * 10**9)
    assert (found.block_size, found.nprobe, found.encoding) == (256, 8, "compact")


def test_the_runs_own_base_keeps_its_keys_and_its_memory() -> None:
    memory = MemoryConfig.from_dict(RUN["memory"])
    for flags in ({}, {"width": 512, "vocab_size": 4096}, {"parameters": 1.1e6}, {"input_layers": 1}):
        found = planned(**flags, positions=10**6)
        assert (found.dim, found.memory) == (64, memory)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"width": 4096}, "--parameters, --vocab-size"),
        ({"vocab_size": 128_256}, "--parameters, --width"),
        ({"width": 4096, "vocab_size": 128_256}, "--parameters"),
    ],
)
def test_a_base_is_not_put_together_from_two(given: dict[str, int], missing: str) -> None:
    with pytest.raises(UserError, match=f"^{missing} missing: give them, or --model; .* --calibrate"):
        planned(**given)


def test_other_inputs_need_another_memory_and_other_codes_other_keys() -> None:
    found = planned(input_layers=3)
    assert (found.dim, found.memory.input_size) == (64, 3 * 512)
    raw = {**RUN, "codec": "raw", "dim": 512}
    assert planned(raw).dim == 512 and planned(raw, codec="int8").dim == 256
    assert planned(codec="raw").dim == 512


def test_the_runs_perplexity_belongs_to_its_k() -> None:
    assert planned(k=64).neighbour_perplexity == 9
    assert planned(k=1024).neighbour_perplexity == 100
