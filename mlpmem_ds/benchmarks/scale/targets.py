"""Benchmark `scale`, measures of writing targets over several ranks: search by the owners of lists against
search by each rank alone."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlpmem_ds.benchmarks.made_up_keys import synthetic_keys, write_made_up_keys
from mlpmem_ds.benchmarks.scale.measure import Measure
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.log import read_events
from mlpmem_ds.core.world import World, world_from_environment
from mlpmem_ds.formats.keys import open_keys

_LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, kw_only=True)
class _Config(Flags):
    """The flags of made-up keys."""

    output: Path = option("directory", identity="none")
    vocab_size: int = option("token ids", 50257)


def list_search_over_today_cpu(
    work: Path,
    *,
    num_keys: int = 1 << 16,
    num_dims: int = 256,
    num_lists: int = 256,
    nprobe: int = 32,
    k: int = 1024,
    ranks: int = 2,
    runs: int = 3,
) -> float:
    """Targets a second of ranks that were launched together (`--exchange auto`) over those of ranks that
    share a file system alone (`none`), from the same lists; a thread a rank, medians of runs in turn."""
    _prepare(work, num_keys, num_dims, num_lists)
    command = [sys.executable, "-m", "mlpmem_ds", "write_targets", "--keys", f"{work}/keys"]
    command += ["--index", f"{work}/index", "--lists", f"{work}/lists", "--search", "ivf", "--threads", "1"]
    command += ["--k", str(k), "--nprobe", str(nprobe), "--shard-positions", str(num_keys // (4 * ranks))]
    seconds: dict[str, list[float]] = {"auto": [], "none": []}
    for number in range(runs):
        for how, measured in seconds.items():
            output = work / f"targets-{how}-{number}"
            _launch([*command, "--output", str(output), "--exchange", how], ranks)
            measured.append(_seconds_of_shards(output))
    return statistics.median(seconds["none"]) / statistics.median(seconds["auto"])


def owners_over_alone_cpu(
    work: Path,
    *,
    num_keys: int = 1 << 18,
    num_dims: int = 256,
    num_lists: int = 128,
    num_queries: int = 4096,
    nprobe: int = 32,
    k: int = 1024,
    ranks: int = 2,
    runs: int = 3,
) -> float:
    """Queries a second of ranks that own lists and search together, over those of ranks that search alone,
    each query's lists holding 65,536 keys; a thread a rank, medians of runs in turn."""
    _prepare(work, num_keys, num_dims, num_lists)
    arguments = ", ".join(map(repr, (str(work), num_queries, nprobe, k, runs)))
    code = f"from {__name__} import measure_rank; measure_rank({arguments})"
    seconds = json.loads(_launch([sys.executable, "-c", code], ranks))
    return statistics.median(seconds["alone"]) / statistics.median(seconds["together"])


def _prepare(work: Path, num_keys: int, num_dims: int, num_lists: int) -> None:
    """Keys and their lists."""
    from mlpmem_ds.stages.index import build_index

    config = _Config(output=work / "keys")
    codes_ND, values_N = synthetic_keys(num_keys, num_dims, config.vocab_size)
    write_made_up_keys(work / "keys", codes_ND, values_N, config, World(), unit_positions=1 << 14)
    build = build_index.Config(keys=work / "keys", output=work / "index", factory=f"IVF{num_lists}")
    build_index.run(build, World())


def _launch(command: Sequence[str], ranks: int) -> str:
    """Run a command in ranks that torch.distributed can connect; what rank 0 printed."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_VARIABLES)
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = inherited | {name: str(value) for name, value in launched.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8"))
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{' '.join(command)} failed in {ranks} ranks")
    return said[0]


def _seconds_of_shards(output: Path) -> float:
    """From the record of the sample to that of the last shard."""
    lines = read_events(output / "log.jsonl")
    times = {line["unit"]: line["time"] for line in lines if line["event"] == "unit"}
    return float(max(times.values()) - times["weighting"])


def measure_rank(work: str, num_queries: int, nprobe: int, k: int, runs: int) -> None:
    """One rank of `owners_over_alone_cpu`: the seconds of its searches in both ways, until all ranks
    are there."""
    import torch

    from mlpmem_ds.engines.collectives.opening import open_ranks
    from mlpmem_ds.formats.index_directory import open_index
    from mlpmem_ds.maths.neighbours import Exclusion
    from mlpmem_ds.stages.retrieval.list_owners import ListOwners
    from mlpmem_ds.stages.retrieval.list_search import ListSearch
    from mlpmem_ds.stages.retrieval.neighbour_search import open_search

    torch.set_num_threads(1)
    world, root = world_from_environment(os.environ), Path(work)
    keys, index = open_keys(root / "keys"), open_index(root / "index")
    with open_ranks(world, "torch", os.environ) as ranks:
        alone = open_search(
            keys,
            index,
            how="lists",
            nprobe=nprobe,
            lists=root / "lists",
            threads=1,
            world=world,
            dealer=ranks,
        )
        assert isinstance(alone, ListSearch)
        together = ListOwners(alone, ranks)
        together.prepare()
        # Neighbours in the text, as the positions of a shard are.
        positions = np.arange(num_queries) + world.rank * (keys.num_positions // world.size)
        queries_QD = keys.gather("keys", positions)
        exclusion = Exclusion(query_ids_Q=positions)
        seconds: dict[str, list[float]] = {"alone": [], "together": []}

        def timed(search: Callable[..., object]) -> float:
            ranks.wait()
            start = time.perf_counter()
            search(queries_QD, k, exclusion)
            return max(ranks.gather(time.perf_counter() - start))

        for _ in range(runs):
            seconds["alone"].append(timed(alone.search))
            seconds["together"].append(timed(together.search))
    if world.is_first:
        sys.stdout.write(json.dumps(seconds))


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="list_search_over_today_cpu",
        function=list_search_over_today_cpu,
        goal=1,
        direction="at least",
        meaning="targets a second of two CPU ranks with --exchange auto over two with none, which search the"
        " same way on one host: a miss by hundredths is noise",
    ),
    Measure(
        name="owners_over_alone_cpu",
        function=owners_over_alone_cpu,
        goal=0.8,
        direction="at least",
        meaning="queries a second of two CPU ranks that own lists over two that search alone (on one host,"
        " auto lets each search alone)",
    ),
)
