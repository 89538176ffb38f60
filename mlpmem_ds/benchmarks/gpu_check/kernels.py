"""Steps of the GPU check: the head's loss, search among keys, assignment to lists.

Shape legend: Q queries, N keys, L lists, P probes, D numbers in a key.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from mlpmem_ds.benchmarks.gpu_check.steps import Context
from mlpmem_ds.benchmarks.loss_gpu import Sizes as LossSizes
from mlpmem_ds.benchmarks.loss_gpu import loss_arms, seconds_on
from mlpmem_ds.maths.centroids import nearest_centroids
from mlpmem_ds.maths.distances import CPU
from mlpmem_ds.maths.knn import pack_exact_neighbours, pack_list_neighbours
from mlpmem_ds.maths.knn_on_device import load_keys
from mlpmem_ds.maths.listed_keys import ListedKeys, in_list_order
from mlpmem_ds.maths.lists_on_device import list_neighbours_on_device
from mlpmem_ds.maths.neighbours import Exclusion
from mlpmem_ds.maths.products import adds_to_wider_total

_SECONDS_OF_LOSS = 0.020  # 4,096 rows of 4,096 numbers at V 128,256
_COMPARED_KEYS = 20_000
_ALIGNMENT_COST = 1.2  # V 50,257 over V 50,304


def measure_loss(context: Context) -> None:
    """Device seconds of forward and backward by vocabulary, next to the matrix products alone."""
    sizes, report = context.sizes, context.report
    device = context.device.type
    report.fact("adds_in_one_pass", adds_to_wider_total(torch.bfloat16, context.device))
    seconds_of: dict[int, float] = {}
    for vocab_size in sizes.loss_vocab_sizes:
        arms = loss_arms(
            device,
            LossSizes(
                rows=sizes.loss_rows,
                width=sizes.loss_width,
                vocab_size=vocab_size,
                entries=sizes.loss_entries,
            ),
        )
        medians = {}
        for name, arm in arms.items():
            arm()  # compiles, and chooses algorithms
            medians[name] = statistics.median(seconds_on(device, arm) for _ in range(sizes.runs))
        ours, products = medians["gpu_loss"], medians["gpu_matmuls"]
        seconds_of[vocab_size] = ours
        goal = _SECONDS_OF_LOSS if vocab_size == max(sizes.loss_vocab_sizes) else None
        report.speed(f"loss_seconds_v{vocab_size}", ours, "s", at_most=goal)
        report.speed(f"loss_over_products_v{vocab_size}", ours / products, "")
    odd, even = sorted(sizes.loss_vocab_sizes)[:2]
    report.speed(f"loss_v{odd}_over_v{even}", seconds_of[odd] / seconds_of[even], "", at_most=_ALIGNMENT_COST)


def measure_search(context: Context) -> None:
    """Queries a second and device operations a query, of exact search and of search in lists."""
    device = context.device
    _measure_exact(context, device)
    _measure_lists(context, device)


def _measure_exact(context: Context, device: torch.device) -> None:
    sizes = context.sizes
    codes_ND = _random_codes(sizes.exact_keys, sizes.dim, device, seed=1)
    keys = load_keys(codes_ND, device)  # a rehearsal runs what a GPU runs

    def search(count: int = sizes.exact_queries) -> Any:
        exclusion = Exclusion(query_ids_Q=np.arange(count))
        return pack_exact_neighbours(codes_ND[:count], keys, sizes.k, exclusion=exclusion, device=device)

    search(64)
    # A million against a million in ten seconds.
    rate = sizes.exact_queries / _seconds(search)
    context.report.speed("exact_queries_per_second", rate, "1/s", at_least=1e5)
    some_ND, k = codes_ND[:_COMPARED_KEYS], min(sizes.k, _COMPARED_KEYS // 2)
    found = pack_exact_neighbours(some_ND[:64], load_keys(some_ND, device), k, exclusion=None, device=device)
    expected = pack_exact_neighbours(some_ND[:64].cpu(), some_ND.cpu(), k, exclusion=None, device=CPU)
    different = int((found.packed_QK != expected.packed_QK).sum())
    context.report.fact("exact_neighbours_other_than_cpu", different, at_most=0)


def _measure_lists(context: Context, device: torch.device) -> None:
    sizes, report = context.sizes, context.report
    lists, probes_QP, queries_QD = _listed_problem(context, device)
    on_device = lists.group(0, sizes.num_lists, device)

    def search(count: int = sizes.list_queries) -> Any:
        return list_neighbours_on_device(
            queries_QD[:count], probes_QP[:count], on_device, sizes.k, exclusion=None, device=device
        )

    search(64)
    report.speed("list_queries_per_second", sizes.list_queries / _seconds(search), "1/s", at_least=5e4)
    report.speed("list_operations_per_query", _num_operations(search) / sizes.list_queries, "", at_most=0.5)
    _compare_with_host(context, lists, on_device, probes_QP, queries_QD, device)


def measure_assignment(context: Context) -> None:
    """Keys a second to the nearest of many centroids."""
    sizes, report, device = context.sizes, context.report, context.device
    keys_ND = _random_codes(sizes.assign_keys, sizes.dim, device, seed=3)
    for num_lists, goal in zip(sizes.assign_lists, (4e6, 1e6), strict=True):
        centroids_LD = _random_codes(num_lists, sizes.dim, device, seed=4)
        nearest_centroids(keys_ND[:100], centroids_LD, 1)
        seconds = _seconds(partial(nearest_centroids, keys_ND, centroids_LD, 1))
        report.speed(f"assigned_keys_per_second_l{num_lists}", len(keys_ND) / seconds, "1/s", at_least=goal)
        found_NP, _ = nearest_centroids(keys_ND[:100], centroids_LD, 1)
        expected_NP, _ = nearest_centroids(keys_ND[:100].cpu(), centroids_LD.cpu(), 1)
        report.fact(f"other_lists_than_cpu_l{num_lists}", int((found_NP != expected_NP).sum()), at_most=0)


def _listed_problem(context: Context, device: torch.device) -> tuple[ListedKeys, np.ndarray, np.ndarray]:
    """Random keys in equal lists on the host, probes [Q, P] int64, queries [Q, D]: only their geometry is
    that of an index."""
    sizes = context.sizes
    codes_ND = _random_codes(sizes.list_keys, sizes.dim, device, seed=2).cpu().numpy()
    offsets_L1 = np.linspace(0, sizes.list_keys, sizes.num_lists + 1).astype(np.int64)
    lists = in_list_order(codes_ND, offsets_L1, np.arange(sizes.list_keys))
    generator = np.random.default_rng(5)
    first_Q = generator.integers(sizes.num_lists, size=(sizes.list_queries, 1))
    step_Q = 1 + 2 * generator.integers(sizes.num_lists // 4, size=(sizes.list_queries, 1))
    probes_QP = (first_Q + step_Q * np.arange(sizes.num_probes)) % sizes.num_lists
    return lists, probes_QP, codes_ND[: sizes.list_queries]


def _compare_with_host(
    context: Context,
    lists: ListedKeys,
    on_device: ListedKeys,
    probes_QP: np.ndarray,
    queries_QD: np.ndarray,
    device: torch.device,
) -> None:
    """The same neighbours as on the host, whose search has been tested against brute force."""
    problem = queries_QD[:64], probes_QP[:64]
    k = context.sizes.k
    found = list_neighbours_on_device(*problem, on_device, k, exclusion=None, device=device)
    expected = pack_list_neighbours(*problem, lists, k, exclusion=None, device=CPU)
    context.report.fact(
        "neighbours_other_than_cpu", int((found.packed_QK != expected.packed_QK).sum()), at_most=0
    )


def _random_codes(count: int, dim: int, device: torch.device, *, seed: int) -> torch.Tensor:
    """int8 [count, dim]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randint(-127, 128, (count, dim), generator=generator, device=device, dtype=torch.int8)


def _seconds(function: Callable[[], Any]) -> float:
    """Wall seconds of one call, until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _num_operations(function: Callable[[], Any]) -> int:
    """Kernels that one call launches on a GPU; on a CPU operators that it calls."""
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        function()
    return sum(event.count for event in profiler.key_averages())
