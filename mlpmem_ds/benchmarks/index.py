"""Benchmark `index`: keys → **neighbours**, by exact search and through inverted lists, compared with faiss's
own searches.

exact             maths.knn.exact_neighbours: --exact-queries of the keys against --exact-keys of them, self
                  excluded.
ivf               maths.knn.list_neighbours as write_targets calls it: lists assigned, keys read list by list,
                  exact distances of the codes, self excluded by id, rows sorted by (distance, id). As there,
                  each thread takes a share of the queries (exact does too).
faiss_search      stock IndexIVFFlat.search for k + 1 of the same queries and probes, over the same lists;
                  float32 vectors.
faiss_big_batch   faiss.contrib.big_batch_search on that index, method knn_function.

ivf and the two comparators have the same centroids, lists, probes and threads, and give exact distances of
the same vectors: their neighbours differ in ties alone. Total variation is that of the kNN targets at a
weight perplexity of --perplexity against exact search of all keys, mean over sampled queries.
`exact_seconds_1e5` is the wall time of all of 1e5 queries against 1e5 keys, extrapolated in proportion from
the queries and keys that were timed.

Without --keys codes and values are made up (clusters of clusters, Zipf values): they stand in for real ones
in speed; judge fidelity on real ones. With CUDA, exact and list search are timed there too, with
their share of --gpu-tops.

Shape legend: N keys, Q queries, D numbers in a key, K neighbours, P probes, L lists.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np
import torch

from mlpmem_ds.benchmarks.common import (
    Report,
    Row,
    check_output,
    interleave,
    median_of,
    peak_bytes_above_start,
    row_of,
    timing_rows,
    use_threads,
)
from mlpmem_ds.benchmarks.targets import synthetic_keys
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.hashing import sample_positions
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.maths.knn import Exclusion, Neighbours, exact_neighbours, list_neighbours
from mlpmem_ds.maths.knn_on_device import load_keys
from mlpmem_ds.maths.listed_keys import ListedKeys, in_list_order
from mlpmem_ds.maths.target_distance import neighbour_variation, recall
from mlpmem_ds.maths.weighting import fit_weighting
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.index.factory import choose_factory
from mlpmem_ds.stages.targets.config import check_perplexity

_SEED = 1


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Exact search, list search and index building, compared with faiss.

    The default sizes take about 3 minutes on two cores.
    """

    example: ClassVar[str] = "python tools/bench.py index --output index.json"

    output: Path = option("JSON file to write")
    keys: Path | None = option(
        "key directory (int8) to take keys and values from, in place of made-up ones", None
    )
    positions: int = option(
        "keys of the list search: the first ones of --keys, or made-up ones", 500_000, at_least=1
    )
    dim: int = option("numbers in a made-up key", 256, at_least=1)
    vocab_size: int = option("vocabulary of the made-up values", 50257, at_least=1)
    factory: str = option("faiss factory of the index that is built and timed, or auto", "auto")
    k: int = option("neighbours of a query", 1024, at_least=1)
    nprobe: int = option("lists that a query probes", 16, at_least=1)
    queries: int = option("queries of the list search: the first keys", 16384, at_least=1)
    exact_keys: int = option("keys of the exact search: the first ones", 100_000, at_least=1)
    exact_queries: int = option("queries of the exact search: the first keys", 20_000, at_least=1)
    perplexity: float = option("neighbours that count, for the total variation", 300.0, above=1)
    sample: int = option("queries compared with exact search of all keys", 300, at_least=1)
    gpu_keys: int = option("where CUDA is: made-up keys of the list search there", 10_000_000)
    gpu_exact_keys: int = option("where CUDA is: made-up keys of the exact search there", 1_000_000)
    gpu_exact_dim: int = option("where CUDA is: numbers in a key of the exact search there", 1024)
    gpu_queries: int = option("where CUDA is: queries timed, of all keys as queries", 65536)
    gpu_tops: float = option("dense int8 peak of the GPU, in 10^12 operations a second", 1979.0)
    runs: int = option("timed runs of each arm", 3, at_least=1)
    threads: int | None = shared_flags.threads()

    def check(self) -> None:
        if not 1 <= self.sample <= self.queries <= self.positions:
            raise UserError(
                f"--sample {self.sample}, --queries {self.queries} and --positions {self.positions} must"
                " ascend"
            )
        if self.exact_queries > self.exact_keys or self.exact_keys > self.positions:
            raise UserError(
                f"--exact-queries {self.exact_queries}, --exact-keys {self.exact_keys} and --positions "
                f"{self.positions} must ascend"
            )
        check_perplexity(self.perplexity, self.k, flag="--perplexity")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Keys, and the same lists as ours and as faiss's own index of whole vectors."""

    codes_ND: np.ndarray
    values_N: np.ndarray
    queries_Q: np.ndarray
    trained: Any
    lists: ListedKeys  # once for all queries, as write_targets has them
    flat: Any
    build_seconds: float
    factory: str


def run(config: Config, world: World) -> None:
    check_output(config.output)
    use_threads(config.threads)
    if config.threads:
        faiss.omp_set_num_threads(config.threads)
    report = Report("index", config)
    rows, ratios = measure(config, make_problem(config))
    if torch.cuda.is_available():
        rows += gpu_rows(config, torch.device("cuda", 0))
    report.publish(config.output, rows, ratios)


def make_problem(config: Config) -> Problem:
    """Take or make the keys, and build both indexes; the build that is timed is ours, of the asked
    factory."""
    codes_ND, values_N = _keys(config)
    factory = config.factory
    if factory == "auto":
        factory = choose_factory(*codes_ND.shape)[0]
    index = Index.make(factory, codes_ND.shape[1])
    sample = codes_ND[sample_positions(len(codes_ND), index.num_training_vectors, seed=_SEED)]
    start = time.perf_counter()
    index.train(sample, seed=_SEED)
    index.fill(codes_ND, np.arange(len(codes_ND)))
    build_seconds = time.perf_counter() - start
    offsets_L1, ids_N = index.lists()
    # The same lists over whole vectors: the same centroids, from the same sample.
    flat = faiss.IndexIVFFlat(index.raw.quantizer, codes_ND.shape[1], index.num_lists)
    flat.own_fields, flat.is_trained, flat.nprobe = False, True, config.nprobe
    Index(flat).fill(codes_ND, np.arange(len(codes_ND)))
    return Problem(
        codes_ND=codes_ND,
        values_N=values_N,
        queries_Q=np.arange(config.queries),
        trained=index,
        lists=in_list_order(codes_ND, offsets_L1, ids_N),
        flat=flat,
        build_seconds=build_seconds,
        factory=factory,
    )


def measure(config: Config, problem: Problem) -> tuple[list[Row], dict[str, float]]:
    """Time all arms, then take the fidelity and the peak memory of each in runs of their own."""
    searches: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "ivf": partial(ivf, config, problem),
        "faiss_search": partial(faiss_search, config, problem),
        "faiss_big_batch": partial(faiss_big_batch, config, problem),
    }
    import_big_batch_search()  # before the clock starts
    timings = interleave({"exact": partial(exact, config, problem), **searches}, config.runs)
    rows = timing_rows(timings)
    for arm, values in timings.items():
        count = config.exact_queries if arm == "exact" else config.queries
        rows.append(row_of(arm, "queries", "queries", [count]))
        rows.append(
            row_of(arm, "queries_per_second", "queries/s", [count / timing.wall for timing in values])
        )
        rows.append(
            row_of(arm, "queries_per_cpu_second", "queries/s", [count / timing.cpu for timing in values])
        )
    scale = (100_000 / config.exact_queries) * (100_000 / config.exact_keys)
    rows.append(row_of("exact", "seconds_1e5", "s", [timing.wall * scale for timing in timings["exact"]]))
    rows.append(row_of("build", "seconds", "s", [problem.build_seconds]))
    rows.append(row_of("build", "lists", "lists", [len(problem.lists.sizes_L)]))
    rows += _fidelity(config, problem, searches)
    arms: dict[str, Callable[[], Any]] = {"exact": partial(exact, config, problem), **searches}
    for arm, function in arms.items():
        rows.append(row_of(arm, "peak_memory_above_start", "B", [peak_bytes_above_start(function)]))
    ratios = {
        "exact_seconds_1e5": median_of(rows, "exact", "seconds_1e5"),
        "ivf_queries_per_second": median_of(rows, "ivf", "queries_per_second"),
        "speed_over_big_batch_search": _speed(rows, "faiss_big_batch"),
        "speed_over_faiss_search": _speed(rows, "faiss_search"),
        "tv": median_of(rows, "ivf", "tv"),
        "recall_at_k": median_of(rows, "ivf", "recall_at_k"),
        "build_seconds": problem.build_seconds,
    }
    return rows, ratios


def exact(config: Config, problem: Problem) -> list[Neighbours]:
    """The neighbours, a share of the queries after the other."""
    keys_ND = problem.codes_ND[: config.exact_keys]
    k = min(config.k, len(keys_ND))

    def search(queries: np.ndarray) -> Neighbours:
        return exact_neighbours(keys_ND[queries], keys_ND, k, exclusion=Exclusion(query_ids_Q=queries))

    return in_threads(search, np.arange(config.exact_queries))


def ivf(config: Config, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(squared distances [Q, K], ids [Q, K], -1 where missing)."""
    distances_QK = np.empty((len(problem.queries_Q), config.k), np.int64)
    ids_QK = np.empty_like(distances_QK)

    def search(rows: np.ndarray) -> None:
        queries = problem.queries_Q[rows]
        queries_QD = problem.codes_ND[queries]
        probes_QP = problem.trained.assign(queries_QD, config.nprobe)
        found = list_neighbours(
            queries_QD, probes_QP, problem.lists, config.k, exclusion=Exclusion(query_ids_Q=queries)
        )
        distances_QK[rows], ids_QK[rows] = found.distances_QK, found.ids_QK

    in_threads(search, np.arange(len(problem.queries_Q)))
    return distances_QK, ids_QK


def in_threads(search: Callable[[np.ndarray], Any], queries_Q: np.ndarray) -> list[Any]:
    """Each thread takes a share of the queries, one thread of torch's each, as write_targets does; what they
    return."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(search, np.array_split(queries_Q, count)))
    finally:
        torch.set_num_threads(count)


def faiss_search(config: Config, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """As above, with the query itself still among its k + 1."""
    return problem.flat.search(problem.codes_ND[problem.queries_Q].astype(np.float32), config.k + 1)


@cache
def import_big_batch_search() -> Any:
    """faiss.contrib's function; its import prints a line if scipy is missing."""
    with contextlib.redirect_stdout(io.StringIO()):
        from faiss.contrib.big_batch_search import big_batch_search
    return big_batch_search


def faiss_big_batch(config: Config, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """As `faiss_search`."""
    queries_QD = problem.codes_ND[problem.queries_Q].astype(np.float32)
    with contextlib.redirect_stdout(io.StringIO()):  # a line for each list, even without verbose
        return import_big_batch_search()(problem.flat, queries_QD, config.k + 1, method="knn_function")


def without_self(distances_QC: np.ndarray, ids_QC: np.ndarray, queries_Q: np.ndarray, k: int) -> Neighbours:
    """The k nearest of each row that are not the query, in the order (distance, id)."""
    hidden_QC = (ids_QC < 0) | (ids_QC == queries_Q[:, None])
    distances_QC = np.where(hidden_QC, np.inf, distances_QC.astype(np.float64))
    order_QK = np.lexsort((ids_QC, distances_QC), axis=1)[:, :k]
    distances_QK = np.take_along_axis(distances_QC, order_QK, axis=1)
    ids_QK = np.where(np.isinf(distances_QK), -1, np.take_along_axis(ids_QC, order_QK, axis=1))
    return Neighbours(ids_QK=ids_QK, distances_QK=distances_QK)


def gpu_rows(config: Config, device: torch.device) -> list[Row]:
    """Exact and list search on a device over made-up codes; seconds for all keys as queries, in proportion to
    those timed."""
    generator = np.random.default_rng(_SEED)
    keys_ND = generator.integers(-127, 128, (config.gpu_exact_keys, config.gpu_exact_dim), dtype=np.int8)
    queries = np.arange(min(config.gpu_queries, len(keys_ND)))
    k = min(config.k, len(keys_ND))

    loaded = load_keys(keys_ND, device)  # once for all searches, as `ExactSearch` does

    def search_exactly() -> Neighbours:
        exclusion = Exclusion(query_ids_Q=queries)
        return exact_neighbours(keys_ND[queries], loaded, k, exclusion=exclusion, device=device)

    rows = _gpu_arm(
        "gpu_exact", search_exactly, config, queries, len(keys_ND), len(keys_ND), config.gpu_exact_dim
    )
    codes_ND = synthetic_keys(config.gpu_keys, config.dim, 1000)[0]
    factory = choose_factory(*codes_ND.shape)[0].partition(",")[0] + ",Flat"
    trained = Index.make(factory, config.dim, device)
    trained.train(
        codes_ND[sample_positions(len(codes_ND), trained.num_training_vectors, seed=_SEED)], seed=_SEED
    )
    lists_N = trained.assign(codes_ND, 1)[:, 0]
    ids_N = np.argsort(lists_N, kind="stable")
    offsets_L1 = np.concatenate([[0], np.cumsum(np.bincount(lists_N, minlength=trained.num_lists))])
    queries = np.arange(min(config.gpu_queries, len(codes_ND)))
    probes_QP = trained.assign(codes_ND[queries], config.nprobe)
    lists = in_list_order(codes_ND, offsets_L1, ids_N).group(0, trained.num_lists, device)

    def search_lists() -> Neighbours:
        return list_neighbours(
            codes_ND[queries],
            probes_QP,
            lists,
            k,
            exclusion=Exclusion(query_ids_Q=queries),
            device=device,
        )

    candidates = float(np.diff(offsets_L1)[probes_QP].sum(1).mean())
    return rows + _gpu_arm("gpu_ivf", search_lists, config, queries, len(codes_ND), candidates, config.dim)


def _gpu_arm(
    arm: str,
    search: Callable[[], Neighbours],
    config: Config,
    queries: np.ndarray,
    num_keys: int,
    candidates: float,
    dim: int,
) -> list[Row]:
    search()  # the first run loads kernels and asks for memory
    timings = interleave({arm: search}, config.runs)[arm]
    seconds = [timing.wall * num_keys / len(queries) for timing in timings]
    operations = 2.0 * num_keys * candidates * dim
    return [
        row_of(arm, "queries", "queries", [len(queries)]),
        row_of(arm, "seconds_of_all_keys", "s", seconds),
        row_of(
            arm,
            "share_of_peak",
            "share",
            [operations / value / (config.gpu_tops * 1e12) for value in seconds],
        ),
    ]


def _keys(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(int8 codes [N, D], values [N])."""
    if config.keys is None:
        return synthetic_keys(config.positions, config.dim, config.vocab_size)
    keys = open_keys(config.keys)
    if keys.codec != "int8" or keys.num_positions < config.positions:
        raise UserError(
            f"--keys {config.keys} holds {keys.num_positions:,} keys of codec {keys.codec}: give int8 keys,"
            f" and --positions up to their number ({config.positions:,} now)"
        )
    return keys.read("keys", 0, config.positions), keys.read("values", 0, config.positions)


def _fidelity(
    config: Config, problem: Problem, searches: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]]
) -> list[Row]:
    """Total variation and recall of each search, against exact search of all keys."""
    chosen = np.linspace(0, config.queries - 1, config.sample).astype(np.int64)
    positions = problem.queries_Q[chosen]
    exact = exact_neighbours(
        problem.codes_ND[positions], problem.codes_ND, config.k, exclusion=Exclusion(query_ids_Q=positions)
    )
    exact_distances = np.where(exact.ids_QK >= 0, exact.distances_QK, np.inf)
    weighting = fit_weighting("softmax", exact_distances, exact.ids_QK >= 0, config.perplexity)
    values_N = problem.values_N.astype(np.int64)

    def weigh(ids_QK: np.ndarray, distances_QK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        valid_QK = ids_QK >= 0
        squared_QK = np.where(valid_QK, distances_QK, 0).astype(np.float64)
        return weighting.weights(squared_QK, valid_QK), values_N[np.maximum(ids_QK, 0)]

    rows = []
    for arm, search in searches.items():
        distances_QC, ids_QC = search()
        found = without_self(distances_QC[chosen], ids_QC[chosen], positions, config.k)
        variations = neighbour_variation(
            *weigh(exact.ids_QK, exact.distances_QK), *weigh(found.ids_QK, found.distances_QK)
        )
        rows.append(row_of(arm, "tv", "total variation", [float(np.mean(variations))]))
        rows.append(
            row_of(arm, "recall_at_k", "share", [float(recall(found.ids_QK, exact.ids_QK, config.k).mean())])
        )
    return rows


def _speed(rows: list[Row], other: str) -> float:
    return median_of(rows, "ivf", "queries_per_second") / median_of(rows, other, "queries_per_second")
