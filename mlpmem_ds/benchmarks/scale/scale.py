"""Benchmark `scale`: **what a cluster would meet**, counted on a CPU: rows, bytes, operations, opens.

Each measure runs our code on made-up geometry of the size that its name says (5e9 positions, 256 ranks) and
counts; few are timed. So the numbers are those of any machine, and none needs a GPU. They are compared with
goals; a missed goal is said and does not end the run.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.benchmarks.common import Report, check_output, row_of, use_threads
from mlpmem_ds.benchmarks.scale import extraction, index, metadata, reader, search, targets
from mlpmem_ds.benchmarks.scale.measure import Measure
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.stages import shared_flags

_logger = logging.getLogger("mlpmem_ds.benchmarks")
MEASURES: tuple[Measure, ...] = (
    *extraction.MEASURES,
    *reader.MEASURES,
    *search.MEASURES,
    *index.MEASURES,
    *metadata.MEASURES,
    *targets.MEASURES,
)


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """What ranks, devices and files would do at 5e9 and 2e11 positions, counted without a GPU, with goals.

    All measures take a few minutes on two cores.
    """

    example: ClassVar[str] = "python tools/bench.py scale --output scale.json"

    output: Path = option("JSON file to write; a working directory next to it is removed at the end")
    only: str | None = option("measures to take, by name, with commas", None, metavar="NAME[,NAME]")
    threads: int | None = shared_flags.threads()

    def check(self) -> None:
        chosen_measures(self.only, MEASURES)


def chosen_measures(only: str | None, measures: Sequence[Measure]) -> list[Measure]:
    """Those that `--only` names, all without it.

    Raises:
        UserError: a name is not a measure's.
    """
    if only is None:
        return list(measures)
    by_name = {measure.name: measure for measure in measures}
    names = only.split(",")
    if unknown := [name for name in names if name not in by_name]:
        raise UserError(f"--only {','.join(unknown)}: the measures are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def run(config: Config, world: World) -> str:
    """Take the measures, write the JSON, return a table of the goals.

    Raises:
        Exception: that of the first measure that failed, after the others and the JSON.
    """
    check_output(config.output)
    use_threads(config.threads)
    report = Report("scale", config)
    measures = chosen_measures(config.only, MEASURES)
    values, seconds, failures = take(measures, config.output.parent)
    taken = [measure for measure in measures if measure.name in values]
    report.publish(
        config.output,
        [row_of(name, "wall_seconds", "s", [value]) for name, value in seconds.items()],
        values,
        goals={measure.name: measure.describe(values[measure.name]) for measure in taken},
    )
    if failures:
        raise failures[0]
    return table(taken, values)


def take(
    measures: Sequence[Measure], folder: Path
) -> tuple[dict[str, float], dict[str, float], list[Exception]]:
    """Values and wall seconds by name, and what failed; a failure does not stop the next measure."""
    values, seconds, failures = dict[str, float](), dict[str, float](), list[Exception]()
    for measure in measures:
        start = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(prefix=".bench-scale-", dir=folder) as work:
                value = float(measure.function(Path(work)))
        except Exception as error:
            _logger.exception("%s failed", measure.name)
            failures.append(error)
            continue
        values[measure.name] = value
        seconds[measure.name] = time.perf_counter() - start
        _logger.info("%s: %.4g, %.1f s", measure.name, value, seconds[measure.name])
    return values, seconds, failures


def table(measures: Sequence[Measure], values: dict[str, float]) -> str:
    """A line a measure: its value, its goal, and whether it is met."""
    lines = [
        f"{'OK' if measure.is_met_by(values[measure.name]) else 'MISSED':<8}{measure.name:<36}"
        f"{values[measure.name]:>12.4g}  {measure.direction} {measure.goal:g}"
        for measure in measures
    ]
    missed = sum(line.startswith("MISSED") for line in lines)
    return "\n".join([*lines, f"{len(lines) - missed} of {len(lines)} goals are met"])
