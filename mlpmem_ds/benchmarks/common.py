"""Benchmarks: what all of them share. Interleaved timing, peak memory of one arm, the machine in words, the
JSON.

Rows hold medians over the runs; wall seconds depend on what else the machine does, CPU seconds (all
threads of this process) much less, so ratios are taken of CPU seconds where the work is computing. Load
averages are given with them.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import logging
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mlpmem_ds
from mlpmem_ds.core.config import plain_values
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.host import host_bytes
from mlpmem_ds.core.output_files import check_output_file
from mlpmem_ds.core.run_description import VERSIONED_PACKAGES

_logger = logging.getLogger("mlpmem_ds.benchmarks")
_RESET_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one arm over its runs."""

    arm: str
    metric: str
    unit: str
    median: float
    min: float
    max: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one run: by the clock, and of the processor summed over this process's threads."""

    wall: float
    cpu: float


def row_of(arm: str, metric: str, unit: str, values: Sequence[float]) -> Row:
    return Row(
        arm=arm,
        metric=metric,
        unit=unit,
        median=statistics.median(values),
        min=min(values),
        max=max(values),
        runs=len(values),
    )


def median_of(rows: Sequence[Row], arm: str, metric: str) -> float:
    """The median of one row; there must be exactly one with this arm and metric."""
    (found,) = [row.median for row in rows if (row.arm, row.metric) == (arm, metric)]
    return found


def timed(function: Callable[[], Any]) -> Timing:
    """Call once and time it; what it returns is dropped outside the clock."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    timing = Timing(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
    del result
    return timing


def interleave(arms: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[Timing]]:
    """Time the arms in turn, A B A B …, in this process, so that a busy minute of the machine falls on all of
    them."""
    timings: dict[str, list[Timing]] = {arm: [] for arm in arms}
    for run in range(runs):
        for arm, function in arms.items():
            timings[arm].append(timed(function))
            last = timings[arm][-1]
            _logger.info("run %d of %d, %s: %.2f s, %.2f CPU s", run + 1, runs, arm, last.wall, last.cpu)
    return timings


def timing_rows(timings: Mapping[str, Sequence[Timing]]) -> list[Row]:
    """Rows `wall_seconds` and `cpu_seconds` of each arm."""
    return [
        row_of(arm, metric, "s", [getattr(timing, field) for timing in values])
        for arm, values in timings.items()
        for metric, field in (("wall_seconds", "wall"), ("cpu_seconds", "cpu"))
    ]


def in_child(function: Callable[..., int], *arguments: Any) -> int:
    """Call a module-level function in a fresh process that has nothing of this one's memory.

    It is forked from a server that has imported torch, and what torch's fused loss imports late, and done
    nothing else: that saves seconds for each child.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes_above_start(function: Callable[[], Any]) -> int:
    """The most resident memory of this process while `function` runs, less what was resident just before.

    The kernel's own high-water mark (VmHWM), reset at the start: no sampling, so no peak is missed. Call it
    in a fresh child after a small warm-up: memory that an earlier arm left in the allocator would hide in the
    start.

    Raises:
        UserError: this system has no such mark.
    """
    if not os.access(_RESET_PEAK, os.W_OK):
        raise UserError(
            f"peak memory is read from Linux's {_RESET_PEAK}, which cannot be written here: run it on Linux"
        )
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _RESET_PEAK.write_text("5", encoding="ascii")
    start = _status_bytes("VmRSS")
    result = function()
    peak = _status_bytes("VmHWM")
    del result
    return peak - start


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").split("\n"):
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise UserError(f"/proc/self/status has no {field}: run it on Linux")


def use_threads(count: int | None) -> None:
    """Threads of torch in this process; None leaves what the environment says."""
    if count is not None:
        torch.set_num_threads(count)


def check_places(output: Path, page: Path | None = None, *, name: str) -> None:
    """Of a benchmark of many stages.

    Args:
        output: its directory.
        page: that it writes too.
        name: the benchmark's.

    Raises:
        UserError: --output is a file, or --page is in no folder.
    """
    if output.is_file():
        raise UserError(f"--output {output} is a file: name a directory, such as runs/{name}")
    if page is not None:
        check_output_file(page, flag="--page", example="RESULTS.md")


def check_output(path: Path) -> None:
    """Refuse an output that cannot be written, before minutes are spent. Raises UserError."""
    check_output_file(path, example="bench.json")


class Report:
    """The JSON of one benchmark; made before the work, so that it holds the load that the work met."""

    def __init__(self, name: str, config: Any) -> None:
        self._record: dict[str, Any] = {
            "name": name,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "settings": plain_values(config),
        }

    def publish(
        self, path: Path, rows: Sequence[Row], ratios: Mapping[str, float], **blocks: Mapping[str, Any]
    ) -> None:
        """Write the JSON; `blocks` are further parts of it, by name."""
        self._record["machine"]["load_average_after"] = list(os.getloadavg())
        measured = {"rows": [asdict(row) for row in rows], "ratios": dict(ratios)}
        publish_json(path, {**self._record, **measured, **blocks})
        for row in rows:
            _logger.info(
                "%s %s: %.4g %s (%.4g to %.4g, %d runs)",
                row.arm,
                row.metric,
                row.median,
                row.unit,
                row.min,
                row.max,
                row.runs,
            )
        for ratio, value in ratios.items():
            _logger.info("%s: %.4g", ratio, value)


def describe_machine() -> dict[str, Any]:
    """Cores, processor, memory, threads and the variables that rule them, the load (1, 5, 15 minutes) at this
    moment.

    On a machine that others use, OMP_WAIT_POLICY decides much: by default threads spin while they wait for a
    busy core.
    """
    return {
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "memory_bytes": host_bytes(),
        "torch_threads": torch.get_num_threads(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "MKL_"))
        },
        "load_average_before": list(os.getloadavg()),
    }


def describe_versions() -> dict[str, str]:
    versions = {"mlpmem_ds": mlpmem_ds.__version__, "python": platform.python_version()}
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    return versions | {
        package: importlib.metadata.version(package) for package in VERSIONED_PACKAGES if package in installed
    }


def _processor_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
