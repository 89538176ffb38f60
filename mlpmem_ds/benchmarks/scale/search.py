"""Benchmark `scale`, measures of search among keys: launches, tiles and uploads of a GPU of 80 GB, counted on
a CPU in the same code."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from mlpmem_ds.benchmarks.scale.measure import Measure
from mlpmem_ds.benchmarks.scale.operations import CountedOperations
from mlpmem_ds.maths.centroids import rows_of_tile
from mlpmem_ds.maths.device_memory import tile_bytes
from mlpmem_ds.maths.distances import CPU
from mlpmem_ds.maths.knn_on_device import load_keys
from mlpmem_ds.maths.listed_keys import in_list_order
from mlpmem_ds.maths.lists_on_device import list_neighbours_on_device
from mlpmem_ds.maths.neighbours import Exclusion
from mlpmem_ds.stages.retrieval import exact_search
from mlpmem_ds.stages.retrieval.exact_search import ExactSearch

_GPU_BYTES = 80 * 10**9
_GPU = torch.device("cuda:3")


def device_ops_per_query_1e7(
    _work: Path,
    *,
    num_keys: int = 10_000_000,
    num_lists: int = 16_384,
    num_queries: int = 1 << 18,
    nprobe: int = 32,
    k: int = 1024,
    num_dims: int = 256,
    part: int = 128,
) -> float:
    """Launches a query of one call of list search.

    Keys, lists, queries and the budget of memory are all one ``part``-th of what the name promises: a list
    has as many keys and meets as many queries, and the call falls into as many blocks and groups of tiles.
    What was launched is then for all ``num_queries``. (6,353 and 6,178 launches with a part of 256
    and of 128: they hardly depend on it.)
    """
    generator = np.random.default_rng(0)
    lists, keys, queries = num_lists // part, num_keys // part, num_queries // part
    shares = generator.lognormal(sigma=0.5, size=lists)
    numbers_N = generator.choice(lists, keys, p=shares / shares.sum())
    offsets_L1 = np.concatenate([[0], np.cumsum(np.bincount(numbers_N, minlength=lists))])
    keys_ND = generator.integers(-127, 128, (keys, num_dims), dtype=np.int8)
    listed = in_list_order(keys_ND, offsets_L1, np.argsort(numbers_N, kind="stable"))
    # A query probes lists whose numbers are near one another, as two levels of k-means number them.
    firsts_Q1 = generator.integers(0, lists, (queries, 1))
    probes_QP = (firsts_Q1 + generator.permuted(np.tile(np.arange(nprobe), (queries, 1)), axis=1)) % lists
    with _gpu_of_80_gb():
        budget = tile_bytes(_GPU) // part
    with CountedOperations() as counted:
        list_neighbours_on_device(
            keys_ND[:queries],
            probes_QP,
            listed,
            k,
            exclusion=Exclusion(query_ids_Q=np.arange(queries)),
            device=CPU,
            budget=budget,
        )
    return len(counted.names) / num_queries


def assign_rows_per_tile_l262144(_work: Path) -> float:
    """Vectors that are compared with 262,144 centroids in one product on a GPU."""
    with _gpu_of_80_gb():
        return rows_of_tile(262_144, tile_bytes(_GPU))


def key_uploads_per_run(_work: Path, *, num_keys: int = 100_000, calls: int = 20, threads: int = 8) -> float:
    """How often each key goes to the GPU in a run of many calls of exact search by threads that share it."""
    keys = _ReadKeys(np.random.default_rng(0).integers(-127, 128, (num_keys, 16), dtype=np.int8))
    search = ExactSearch(keys, _GPU)  # type: ignore[arg-type]

    def load(keys_ND: Any, device: torch.device) -> Any:
        assert device == _GPU
        return load_keys(keys_ND, CPU)

    with mock.patch.object(exact_search, "load_keys", load), ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda call: search.search(keys.array[call : call + 1], 8), range(calls)))
    return keys.num_rows_read / num_keys


class _ReadKeys:
    """An array that counts the rows that are read of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.num_rows_read = array, 0
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes

    def __getitem__(self, rows: slice) -> np.ndarray:
        part = self.array[rows]
        self.num_rows_read += len(part)
        return part


def _gpu_of_80_gb() -> Any:
    """A GPU with nothing on it, for what asks how much memory is free."""
    return mock.patch.multiple(
        torch.cuda,
        mem_get_info=lambda device: (_GPU_BYTES, _GPU_BYTES),
        memory_reserved=lambda device: 0,
        memory_allocated=lambda device: 0,
    )


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="device_ops_per_query_1e7",
        function=device_ops_per_query_1e7,
        goal=0.5,
        direction="at most",
        meaning=(
            "operations of torch a query in a call of 262,144 queries (32 probes, 1,024 neighbours) among 1e7"
            " keys in 16,384 lists on 80 GB: counted with a 128th of keys, lists, queries and memory"
        ),
    ),
    Measure(
        name="assign_rows_per_tile_l262144",
        function=assign_rows_per_tile_l262144,
        goal=1024,
        direction="at least",
        meaning="vectors compared at once with 262,144 centroids on 80 GB",
    ),
    Measure(
        name="key_uploads_per_run",
        function=key_uploads_per_run,
        goal=1,
        direction="exactly",
        meaning="times that each key is read for the GPU in 20 calls of exact search by 8 threads",
    ),
)
