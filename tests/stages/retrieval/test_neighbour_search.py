"""A search compares on the device that the stage names, in every thread: eight pretended GPUs, the rank with
local rank 3."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core.world import World
from mlpmem_ds.engines import faiss as engine
from mlpmem_ds.maths import kmeans, knn
from mlpmem_ds.maths.distances import CPU
from mlpmem_ds.maths.knn_on_device import load_keys
from mlpmem_ds.maths.listed_keys import ListedKeys
from mlpmem_ds.maths.lists_on_device import list_neighbours_on_device
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.retrieval import exact_search
from mlpmem_ds.stages.targets import write_targets

NUM_KEYS, DIM, VOCAB_SIZE = 403, 6, 40
RANK_3 = World(rank=0, size=1, local_rank=3)


@pytest.fixture
def keys(make_keys: Callable[..., Path], tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    codes = generator.integers(-6, 7, size=(NUM_KEYS, DIM)).astype(np.int8)
    values = generator.integers(0, VOCAB_SIZE, NUM_KEYS)
    return make_keys(tmp_path / "keys", codes, values, vocab_size=VOCAB_SIZE, unit_positions=96, block_size=8)


class PretendedGpus:
    """What would go to a GPU is noted, with the thread, and done on the CPU."""

    def __init__(self) -> None:
        self.devices: dict[str, set[torch.device]] = {}
        self.counts: Counter[str] = Counter()
        self.threads: set[str] = set()

    def note(self, what: str, device: torch.device | str) -> None:
        self.devices.setdefault(what, set()).add(torch.device(device))
        self.counts[what] += 1
        self.threads.add(threading.current_thread().name)

    def load_keys(self, keys_ND: Any, device: torch.device) -> Any:
        self.note("keys", device)
        return load_keys(keys_ND, CPU)

    def search_lists(self, *args: Any, device: torch.device, **options: Any) -> Any:
        self.note("lists", device)
        return list_neighbours_on_device(*args, device=CPU, **options)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> PretendedGpus:
    pretended = PretendedGpus()
    nearest, one_level, group = engine.FlatQuantizer.nearest, kmeans._one_level, ListedKeys.group

    def nearest_on_cpu(quantizer: Any, *args: Any) -> Any:
        pretended.note("centroids", quantizer._device)
        return nearest(engine.FlatQuantizer(quantizer._raw, quantizer._num_lists, CPU), *args)

    def one_level_on_cpu(share: Any, count: Any, seed: Any, iterations: Any, device: Any, ranks: Any) -> Any:
        pretended.note("training", device)
        return one_level(share, count, seed, iterations, CPU, ranks)

    def group_on_cpu(lists: ListedKeys, first: int, stop: int, device: torch.device) -> ListedKeys:
        pretended.note("group", device)
        return group(lists, first, stop, CPU)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 80 * 10**9))
    monkeypatch.setattr(exact_search, "load_keys", pretended.load_keys)
    monkeypatch.setattr(knn, "list_neighbours_on_device", pretended.search_lists)
    monkeypatch.setattr(ListedKeys, "group", group_on_cpu)
    monkeypatch.setattr(engine.FlatQuantizer, "nearest", nearest_on_cpu)
    monkeypatch.setattr(kmeans, "_one_level", one_level_on_cpu)
    return pretended


def config(keys: Path, output: Path, **changes: Any) -> write_targets.Config:
    settings = {"k": 20, "temperature": "6", "shard_positions": 104, "batch_positions": 16, **changes}
    return write_targets.Config(keys=keys, output=output, **settings)


def test_every_search_is_on_the_gpu_of_the_rank(gpus: PretendedGpus, keys: Path, tmp_path: Path) -> None:
    index, num_threads = tmp_path / "index", torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        build_index.run(build_index.Config(keys=keys, output=index, factory="IVF7", num_shards=3), RANK_3)
        write_targets.run(config(keys, tmp_path / "exact", search="exact"), RANK_3)
        options = {"index": index, "search": "ivf", "nprobe": 3}
        write_targets.run(config(keys, tmp_path / "lists", **options), RANK_3)
    finally:
        torch.set_num_threads(num_threads)
    own = {torch.device("cuda:3")}
    expected = dict.fromkeys(("training", "centroids", "keys", "group", "lists"), own)
    assert gpus.devices == expected and gpus.counts["group"] == 1  # lists go to the GPU once
    assert len(gpus.threads) > 1  # workers too, whose current device is that of no one


@pytest.mark.parametrize("search", ["exact", "ivf"])
def test_bytes_do_not_depend_on_the_device(
    gpus: PretendedGpus, keys: Path, tmp_path: Path, search: str
) -> None:
    options: dict[str, Any] = {"search": search}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        if search == "ivf":
            index = build_index.Config(keys=keys, output=tmp_path / "index", factory="IVF7", num_shards=3)
            build_index.run(index, World())
            options |= {"index": tmp_path / "index", "nprobe": 3}
        write_targets.run(config(keys, tmp_path / "cpu", **options), World())
    assert set().union(*gpus.devices.values()) <= {CPU}
    write_targets.run(config(keys, tmp_path / "gpu", **options), RANK_3)
    files = sorted((tmp_path / "cpu").glob("knn-*"))
    assert len(files) == 8
    for path in files:
        assert path.read_bytes() == (tmp_path / "gpu" / path.name).read_bytes()
