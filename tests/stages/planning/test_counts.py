"""What plan counts is what small real runs do: operations, bytes and files, within 30 %."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.engine import Engine
from mlpmem_ds.formats.checkpoint import list_checkpoints
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.models.shape import read_shape
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.planning import plan
from mlpmem_ds.stages.planning.counts import moved, num_files, operations
from mlpmem_ds.stages.planning.rank_memory import gpu_bytes, reader_memory, training_memory
from mlpmem_ds.stages.planning.sizes_on_disk import list_bytes, memory_bytes
from mlpmem_ds.stages.planning.workload import Machine, Workload
from mlpmem_ds.stages.targets import write_targets
from mlpmem_ds.stages.training import train

from .conftest import bytes_of
from .operation_counter import OperationCounter, counted_distances

CLOSE = {"rel": 0.3}
WIDTH = 96
MACHINE = Machine(ranks=1, cores=1, gpus=0, gpu_flops=1e12, memory_bytes=10**10, disk_bytes=10**10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counted") / "base"
    shape = {"vocab_size": 300, "n_positions": 64, "n_embd": WIDTH, "n_layer": 3, "n_head": 2}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(base: Path, corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with its counted operations by stage, in `root`."""
    root = tmp_path_factory.mktemp("counted") / "run"
    root.mkdir()
    (root / "corpus").symlink_to(corpus_dir)
    counted: dict[str, Any] = {"root": root}
    with OperationCounter() as counter:
        extract_keys.run(
            extract_keys.Config(
                model=str(base), corpus=corpus_dir, output=root / "keys", fit_positions=64, device="cpu"
            ),
            World(),
        )
    counted["keys"] = counter.total
    with counted_distances() as counts:
        build_index.run(
            build_index.Config(keys=root / "keys", output=root / "index", factory="IVF16,Flat", num_shards=2),
            World(),
        )
    counted["index"] = sum(counts)
    with counted_distances() as counts:
        write_targets.run(
            write_targets.Config(
                keys=root / "keys",
                index=root / "index",
                output=root / "targets",
                lists=root / "lists",
                k=64,
                neighbour_perplexity=20.0,
                search="ivf",
                nprobe=4,
                shard_positions=320,
            ),
            World(),
        )
    counted["targets"] = sum(counts)
    return counted


def work_of(run: dict[str, Any], **changes: Any) -> Workload:
    positions = open_corpus(run["root"] / "corpus").num_positions
    flags = {"factory": "IVF16,Flat", "search": "ivf", "threads": 1}
    planned = plan.make_plan(plan.Config(positions=positions, calibrate=run["root"], **flags))
    return replace(planned.work, shard_positions=320, **changes)


def files_of(root: Path) -> int:
    listed = json.loads((root / "manifest.json").read_text())["files"]
    return len(listed) + len(list((root / "done").glob("*.json")))


def test_the_sizes_are_those_of_the_run(run: dict[str, Any], base: Path) -> None:
    work = work_of(run)
    assert (work.block_size, work.stride) == (32, 16)
    assert work.parameters == read_shape(str(base)).parameters and work.tokens_read == 2 * work.positions


def test_the_forward_pass_reads_windows_that_overlap(run: dict[str, Any]) -> None:
    assert operations("keys", work_of(run)) == pytest.approx(run["keys"], **CLOSE)


def test_distances_of_index_and_targets_are_counted(run: dict[str, Any]) -> None:
    work = work_of(run)
    assert operations("index", work) == pytest.approx(run["index"], **CLOSE)
    assert operations("targets", work) == pytest.approx(run["targets"], **CLOSE)


def test_exact_search_compares_all_with_all(run: dict[str, Any], tmp_path: Path) -> None:
    with counted_distances() as counts:
        write_targets.run(
            write_targets.Config(
                keys=run["root"] / "keys",
                output=tmp_path / "targets",
                k=64,
                neighbour_perplexity=20.0,
                search="exact",
                shard_positions=320,
            ),
            World(),
        )
    assert operations("targets", work_of(run, search="exact")) == pytest.approx(sum(counts), **CLOSE)


def test_bytes_and_files_are_those_on_the_disk(run: dict[str, Any]) -> None:
    work, root = work_of(run), run["root"]
    for stage in ("keys", "index", "targets"):
        assert num_files(stage, work) == files_of(root / stage), stage
    listed = json.loads((root / "corpus" / "manifest.json").read_text())["files"]
    other_splits = [file for file in listed if file["name"].startswith(("tuning/", "test/", "heldout/"))]
    assert num_files("corpus", work) == files_of(root / "corpus") - len(other_splits)
    assert moved("keys", work, MACHINE).written == pytest.approx(bytes_of(root / "keys"), **CLOSE)
    lists = sum(path.stat().st_size for path in (root / "lists").rglob("*.npy"))
    assert list_bytes(work) == pytest.approx(lists, **CLOSE)
    # Lists are read once, and the keys twice: to bring them into that order, and as queries.
    keys = sum(path.stat().st_size for path in (root / "keys").glob("keys-*.npy"))
    assert moved("targets", work, MACHINE).read > lists + 2 * keys


@pytest.fixture
def train_operations(monkeypatch: pytest.MonkeyPatch) -> Callable[[train.Config], float]:
    """Runs a training; the operations of its steps."""
    totals: list[int] = []
    step = Engine.train_step

    def counting(engine: Engine, *arguments: Any) -> Any:
        with OperationCounter() as counter:
            result = step(engine, *arguments)
        totals.append(counter.total)
        return result

    def run_it(config: train.Config) -> float:
        totals.clear()
        train.run(config, World())
        return float(sum(totals))

    monkeypatch.setattr(Engine, "train_step", counting)
    return run_it


def test_a_training_is_six_operations_a_parameter_and_row(
    run: dict[str, Any], tmp_path: Path, train_operations: Callable[[train.Config], float]
) -> None:
    root, work = run["root"], work_of(run)
    config = train.Config(
        ds_config=ds_configs() / "cpu.json",
        corpus=root / "corpus",
        keys=root / "keys",
        targets=root / "targets",
        output=tmp_path / "memory",
        num_blocks=2,
        epochs=1.0,
        batch_positions=256,
        validate_every=None,
    )
    counted = train_operations(config)
    memory = replace(work.memory, num_blocks=2)
    steps = work.positions // 256
    planned = operations("memory", replace(work, memory=memory, epochs=steps * 256 / work.positions))
    assert planned == pytest.approx(counted, **CLOSE)
    left = [path for part in ("checkpoints/*/*", "weights/*", "done/*") for path in config.output.glob(part)]
    kept = len(list_checkpoints(config.output / "checkpoints"))
    as_left = replace(work, memory=memory, keep_checkpoints=kept)
    assert num_files("memory", as_left) == len(left)
    found = sum(path.stat().st_size for path in left)
    assert memory_bytes(as_left, MACHINE) == pytest.approx(found, rel=0.05)


def test_a_base_next_to_the_training_is_float32_on_a_cpu_and_bfloat16_on_a_gpu(run: dict[str, Any]) -> None:
    stored, online = work_of(run), work_of(run, input_codec="none")
    on_cpu = training_memory(online, MACHINE) - training_memory(stored, MACHINE)
    assert on_cpu == 4 * online.parameters
    on_gpu = replace(MACHINE, gpus=1)
    more = gpu_bytes("memory", online, on_gpu) - gpu_bytes("memory", stored, on_gpu)
    assert more == 2 * online.parameters
    assert training_memory(online, on_gpu) == training_memory(stored, on_gpu)


def test_online_inputs_cost_the_base_again_in_each_epoch(run: dict[str, Any]) -> None:
    """As often as the extraction's forward pass, but for the head."""
    stored, online = work_of(run, epochs=3.0), work_of(run, epochs=3.0, input_codec="none")
    more = operations("memory", online) - operations("memory", stored)
    head = 2.0 * stored.vocab_size * stored.width * stored.positions
    assert more == pytest.approx(3 * (run["keys"] - head), **CLOSE)


def test_the_readers_memory_is_two_windows_of_targets_over_the_ranks(run: dict[str, Any]) -> None:
    work = work_of(run, positions=5 * 10**9, neighbour_perplexity=300.0, k=1024)
    work = replace(work, block_size=1024, width=4096, shuffle_window_blocks=1024, batch_positions=16384)
    one = reader_memory(work, MACHINE)
    assert one == pytest.approx(2 * 2.5e9 + 3 * 16384 * 8192, rel=0.05)
    assert reader_memory(work, replace(MACHINE, ranks=8)) == pytest.approx(one / 8)
    assert np.isclose(one, reader_memory(replace(work, positions=2 * 10**11), MACHINE))
