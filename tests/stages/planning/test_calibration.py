"""What a finished run teaches of the speed of its stages, and of which it says nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import GPT2Config

from mlpmem_ds.core.log import append_json_line
from mlpmem_ds.models.shape import read_shape
from mlpmem_ds.stages.planning import calibration, plan, table
from mlpmem_ds.stages.planning.calibration import calibrate, read_run, sizes_of_run
from mlpmem_ds.stages.planning.workload import Machine

MACHINE = Machine(ranks=1, cores=1, gpus=0, gpu_flops=1e12, memory_bytes=10**10, disk_bytes=10**10)


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """The finished run, whose keys' files may be changed."""
    root = tmp_path / "run"
    root.mkdir()
    shutil.copytree(finished / "keys", root / "keys")
    for name in ("index", "targets"):
        (root / name).symlink_to(finished / name)
    return root


def describe(stage: Path, *, world: int | None = None, **flags: str) -> None:
    """Change what the latest start of a stage says of itself."""
    path = stage / "run.json"
    found = json.loads(path.read_text())
    found["config"] |= flags
    path.write_text(json.dumps(found | ({} if world is None else {"world": world})))


def log(stage: Path, *events: Mapping[str, Any]) -> None:
    for event in events:
        append_json_line(stage / "log.jsonl", {"rank": 0, **event})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The cache of the Hub is empty, and each call over the network is noted and fails."""
    found: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        found.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return found


def test_a_base_by_its_name_on_the_hub_is_read_from_the_cache_alone(
    run_dir: Path, base_dir: Path, tmp_path: Path, calls: list[Any]
) -> None:
    describe(run_dir / "keys", model="owner/base")
    assert "parameters" not in sizes_of_run(read_run(run_dir))
    commit = "1" * 40
    snapshot = tmp_path / "cache" / "models--owner--base" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    shutil.copy(base_dir / "config.json", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    assert sizes_of_run(read_run(run_dir))["parameters"] == read_shape(str(base_dir)).parameters
    assert not calls


@pytest.mark.parametrize("model", ["owner/base", "base", "/nowhere/base", "s3://bucket/base"])
def test_without_the_base_the_time_of_its_passes_is_not_from_the_run(
    run_dir: Path,
    base_dir: Path,
    tmp_path: Path,
    calls: list[Any],
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    GPT2Config(n_embd=32, n_head=2).save_pretrained(tmp_path / "base")  # another one than the run's
    describe(run_dir / "keys", model=model)
    flags = {"positions": 10**6, "model": str(base_dir), "threads": 1}
    found = plan.make_plan(plan.Config(calibrate=run_dir, **flags))
    assert set(found.calibrated) == {"index", "targets"} and not calls
    sizes = sizes_of_run(read_run(run_dir))
    same = {name: sizes[name] for name in ("block_size", "stride", "dim", "input_codec")}
    assert found.costs["keys"].seconds == plan.make_plan(plan.Config(**flags, **same)).costs["keys"].seconds
    assert [line for line in found.warnings if f"the base of {run_dir}/keys" in line]
    (row,) = (line for line in table.render_table(found).splitlines() if line.startswith("keys "))
    assert row.endswith("estimate")


def test_a_training_is_as_fast_as_it_was_unless_it_ran_a_base_that_is_not_on_this_disk(
    run_dir: Path, calls: list[Any]
) -> None:
    (run_dir / "memory").mkdir()
    log(run_dir / "memory", {"event": "started", "time": 0.0, "world": 1}, {"event": "finished", "time": 9.0})
    run = read_run(run_dir)
    run = dataclasses.replace(run, stages=(*run.stages, "memory"))
    stored = plan.make_plan(plan.Config(positions=10**6, calibrate=run_dir)).work
    online = dataclasses.replace(stored, input_codec="none")
    describe(run_dir / "keys", model="owner/base")
    unknown = dataclasses.replace(read_run(run_dir), stages=run.stages)
    for each, work, parts in (
        (run, stored, {"keys", "memory"}),
        (run, online, {"keys", "memory"}),
        (unknown, stored, {"memory"}),
        (unknown, online, set[str]()),
    ):
        factors = calibrate(each, work, MACHINE, threads=1).seconds
        assert factors.keys() == {"index.train", "index.fill", "targets", *parts}


def test_the_ranks_are_those_of_the_start_that_did_the_work(run_dir: Path) -> None:
    run = read_run(run_dir)
    work = plan.make_plan(plan.Config(positions=10**6, calibrate=run_dir)).work
    before = calibrate(run, work, MACHINE, threads=1).seconds["keys"]
    describe(run_dir / "keys", world=7)  # a start that found everything made
    log(
        run_dir / "keys",
        {"event": "started", "time": 4e9, "world": 7},
        {"event": "finished", "time": 4e9},
    )
    assert calibrate(run, work, MACHINE, threads=1).seconds["keys"] == pytest.approx(before)


def test_a_run_was_on_as_many_nodes_as_its_log_says(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node has cores of its own, and what is sent within one goes over its links."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    keys = run_dir / "keys"
    of_one, of_four = (dataclasses.replace(MACHINE, ranks=8 * nodes, nodes=nodes) for nodes in (1, 4))
    for num_nodes in (1, 2, 16):
        (keys / "log.jsonl").unlink()
        for rank in range(16):
            started = {"event": "started", "time": 0.0, "world": 16}
            log(keys, {**started, "rank": rank, "process": f"node boot-{rank % num_nodes} 7 9"})
        for planned in (of_one, of_four):
            found = calibration._machine_of_run(keys, 16, planned, None)
            assert (found.ranks, found.nodes, found.cores) == (16, num_nodes, 4 * num_nodes)
    (keys / "log.jsonl").unlink()  # then as planned
    for planned, num_nodes in ((of_one, 1), (of_four, 2)):
        assert calibration._machine_of_run(keys, 16, planned, None).nodes == num_nodes
