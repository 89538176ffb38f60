"""Benchmark `plan`: **what tools/plan.py says** of a run twice the size of the one it was calibrated on,
compared with what a run used.

Index and targets of 2 N keys, made up or real, and of half of them are made by the front-ends, each in a
process of its own that tells the peak of its own memory (RssAnon every 5 ms: mapped files are shared by the
ranks and not counted). The plan of 2 N is made from flags and the run over N alone. Errors are fractions of
what was measured: bytes of index and targets together, seconds of both together, and the memory of the worse
of the two.

Keys come as the stage extract_keys would leave them, so their bytes are compared too; corpus and training are
not run.

`checksum_share` of a stage: seconds of hashing files (hashing_cost.py) over all of its seconds.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import mlpmem_ds
from mlpmem_ds.benchmarks.common import Report, Row, check_output, row_of, use_threads
from mlpmem_ds.benchmarks.made_up_keys import synthetic_keys, write_made_up_keys
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.hashing import shuffled
from mlpmem_ds.core.log import seconds_of_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.planning import plan
from mlpmem_ds.stages.targets.config import check_perplexity

_STAGES = ("index", "targets")
_SEED = 1
_UNIT_POSITIONS = 65536
_TELL = """
import pathlib, re, sys, threading, time
from mlpmem_ds.benchmarks.hashing_cost import counted_hashing
from mlpmem_ds.commands import main
peak = [0]
def watch():
    while True:
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
        peak[0] = max(peak[0], int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
with counted_hashing() as cost:
    if code := main(sys.argv[1:]):
        sys.exit(code)
print(peak[0], cost.bytes, cost.seconds)
"""


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Bytes, memory and time of index and targets as planned from a run of half the size, and as measured.

    The default sizes take about 3 minutes on two cores.
    """

    example: ClassVar[str] = "python tools/bench.py plan --output plan.json"

    output: Path = option("JSON file to write; a working directory next to it is removed at the end")
    positions: int = option(
        "keys of the run that calibrates; the plan is for twice as many", 150_000, at_least=1
    )
    keys: Path | None = option(
        "key directory (int8) to take keys and values from, in place of made-up ones", None
    )
    dim: int = option("numbers in a made-up key", 256, at_least=1)
    vocab_size: int = option("vocabulary of the made-up values", 50257, at_least=1)
    k: int = option("neighbours of a position", 1024, at_least=1)
    nprobe: int = option("lists that a query probes", 16, at_least=1)
    neighbour_perplexity: float = option("neighbours that count", 100.0, above=1)
    threads: int | None = shared_flags.threads()

    def check(self) -> None:
        check_perplexity(self.neighbour_perplexity, self.k)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a stage left and took."""

    bytes: int
    seconds: float
    memory_bytes: int
    hashed_bytes: int
    hashing_seconds: float

    @property
    def checksum_share(self) -> float:
        """Of the stage's seconds; hashing by several threads at once counts each."""
        return self.hashing_seconds / self.seconds


def run(config: Config, world: World) -> None:
    check_output(config.output)
    use_threads(config.threads)
    report = Report("plan", config)
    with tempfile.TemporaryDirectory(prefix=".bench-plan-", dir=config.output.parent) as work:
        rows, ratios = measure(config, Path(work), world)
    report.publish(config.output, rows, ratios)


def measure(config: Config, work: Path, world: World) -> tuple[list[Row], dict[str, float]]:
    """Run both sizes, the smaller over half of the same keys; plan the larger from the smaller."""
    small, large = work / "small", work / "large"
    codes_ND, values_N = keys_of(config)
    order_N = shuffled(len(codes_ND), _SEED)  # keys of one text are alike: halves must not differ
    codes_ND, values_N = codes_ND[order_N], values_N[order_N]
    run_stages(config, codes_ND[: config.positions], values_N[: config.positions], small, world)
    planned = plan.make_plan(plan_config(config, 2 * config.positions, small))
    measured = run_stages(config, codes_ND, values_N, large, world)
    rows = []
    for stage in _STAGES:
        cost = planned.costs[stage]
        pairs = {"planned": (cost.bytes, cost.seconds or math.nan, cost.rank_memory_bytes)}
        pairs["measured"] = (measured[stage].bytes, measured[stage].seconds, measured[stage].memory_bytes)
        for arm, values in pairs.items():
            for metric, unit, value in zip(
                ("bytes", "seconds", "peak_memory"), ("B", "s", "B"), values, strict=True
            ):
                rows.append(row_of(arm, f"{stage}_{metric}", unit, [float(value)]))
        rows.append(row_of("measured", f"{stage}_hashed", "B", [float(measured[stage].hashed_bytes)]))
    key_files = open_keys(large / "keys").num_bytes
    rows.append(row_of("planned", "keys_bytes", "B", [float(planned.costs["keys"].bytes)]))
    rows.append(row_of("measured", "keys_bytes", "B", [float(key_files)]))
    costs = [planned.costs[stage] for stage in _STAGES]
    seconds = {stage: planned.costs[stage].seconds or math.nan for stage in _STAGES}
    ratios = {
        "bytes_error": _error(
            sum(cost.bytes for cost in costs) + planned.costs["keys"].bytes,
            sum(measured[stage].bytes for stage in _STAGES) + key_files,
        ),
        "time_error": _error(sum(seconds.values()), sum(measured[stage].seconds for stage in _STAGES)),
        "memory_error": max(
            _error(planned.costs[stage].rank_memory_bytes, measured[stage].memory_bytes) for stage in _STAGES
        ),
    }
    for stage in _STAGES:
        ratios[f"bytes_error_{stage}"] = _error(planned.costs[stage].bytes, measured[stage].bytes)
        ratios[f"time_error_{stage}"] = _error(seconds[stage], measured[stage].seconds)
        ratios[f"memory_error_{stage}"] = _error(
            planned.costs[stage].rank_memory_bytes, measured[stage].memory_bytes
        )
        ratios[f"checksum_share_{stage}"] = measured[stage].checksum_share
    return rows, ratios


def keys_of(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(int8 codes, values) of twice --positions: made up, or the first ones of --keys."""
    num_positions = 2 * config.positions
    if config.keys is None:
        return synthetic_keys(num_positions, config.dim, config.vocab_size)
    keys = open_keys(config.keys)
    if (
        keys.codec != "int8"
        or keys.num_positions < num_positions
        or keys.manifest.vocab_size > config.vocab_size
    ):
        raise UserError(
            f"--keys {config.keys} holds {keys.num_positions:,} keys of codec {keys.codec} and a vocabulary"
            f" of {keys.manifest.vocab_size:,}: give int8 keys, --positions up to half of them, and that"
            " --vocab-size"
        )
    dtype = np.uint16 if config.vocab_size <= 2**16 else np.uint32
    return keys.read("keys", 0, num_positions), keys.read("values", 0, num_positions).astype(dtype)


def plan_config(config: Config, positions: int, run_of_half: Path) -> plan.Config:
    """The flags that a user gives: how many tokens, and the run to learn from; the base is of no matter
    here."""
    return plan.Config(
        positions=positions,
        calibrate=run_of_half,
        parameters=1e6,
        threads=torch.get_num_threads(),
        search="ivf",
    )


def run_stages(
    config: Config, codes_ND: np.ndarray, values_N: np.ndarray, root: Path, world: World
) -> dict[str, Measured]:
    """Index and targets of these keys in `root`; what they took."""
    write_made_up_keys(root / "keys", codes_ND, values_N, config, world, unit_positions=_UNIT_POSITIONS)
    threads = ("--threads", config.threads or "none")
    keys, index = ("--keys", root / "keys"), root / "index"
    told = {"index": told_by_front_end("build_index", *keys, "--output", index, *threads)}
    told["targets"] = told_by_front_end(
        *("write_targets", *keys, "--index", index, "--output", root / "targets", *threads),
        *("--k", config.k, "--nprobe", config.nprobe, "--search", "ivf"),
        *("--neighbour-perplexity", config.neighbour_perplexity),
    )
    num_bytes = {
        "index": open_index(index).num_bytes,
        "targets": open_targets(root / "targets").num_bytes,
    }
    return {
        stage: Measured(
            bytes=num_bytes[stage],
            seconds=seconds_of_stage(root / stage) or 0.0,
            memory_bytes=told[stage][0],
            hashed_bytes=told[stage][1],
            hashing_seconds=told[stage][2],
        )
        for stage in _STAGES
    }


def told_by_front_end(name: str, *words: object) -> tuple[int, int, float]:
    """Run a front-end as a user does, in a process of its own: the most bytes of memory that were its own,
    and bytes and seconds of hashing files.

    Raises:
        UserError: it failed; with what it said.
    """
    command = [sys.executable, "-c", _TELL, name, *map(str, words)]
    paths = [str(Path(mlpmem_ds.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode:
        raise UserError(f"{name} failed, so there is nothing to compare with: {done.stderr.strip()}")
    peak, hashed, seconds = done.stdout.split()[-3:]
    return int(peak) * 1024, int(hashed), float(seconds)


def _error(planned: float, measured: float) -> float:
    return abs(planned - measured) / measured
