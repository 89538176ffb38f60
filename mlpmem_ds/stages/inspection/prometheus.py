"""Part of `inspect_run --prometheus`: the figures of a run in Prometheus' text format, version 0.0.4.

For node-exporter's text collector, which reads all `*.prom` files of a directory whenever it is scraped, and
wants them whole: the caller renames the file into place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from mlpmem_ds.stages.inspection.progress import RankState, StageProgress

Labels = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Metric:
    """A gauge; its samples are (labels, value)."""

    name: str
    help: str
    samples: Sequence[tuple[Labels, float]]

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {_escaped(self.help)}"
        yield f"# TYPE {self.name} gauge"
        for labels, value in self.samples:
            shown = ",".join(f'{name}="{_escaped(text, quotes=True)}"' for name, text in labels.items())
            yield f"{self.name}{{{shown}}} {float(value)!r}"


def exposition(
    stages: Sequence[StageProgress], *, run: str, disk_bytes: int, free_bytes: int, time: float
) -> str:
    """The text; a figure that is not known has no sample.

    Args:
        stages: of the run.
        run: its name, a label of every sample.
        disk_bytes, free_bytes: of its file system.
        time: Unix seconds of the look.
    """
    run_labels = {"run": run}
    places: list[tuple[Labels, StageProgress]] = [
        ({**run_labels, "stage": stage.name}, stage) for stage in stages
    ]

    def stage_metric(name: str, help: str, values: Sequence[float | None]) -> _Metric:
        samples = [
            (labels, value) for (labels, _), value in zip(places, values, strict=True) if value is not None
        ]
        return _Metric(name=f"mlpmem_stage_{name}", help=help, samples=samples)

    metrics = [
        stage_metric(
            "complete", "1 if the stage has its manifest.", [one.state == "complete" for one in stages]
        ),
        stage_metric("working", "1 if a rank of it is at work.", [one.state == "working" for one in stages]),
        stage_metric("failed", "1 if its last start failed.", [one.state == "failed" for one in stages]),
        stage_metric(
            "units", "Units, or training steps, of all its phases so far.", [one.total for one in stages]
        ),
        stage_metric("units_done", "Of those, the ones that are done.", [one.done for one in stages]),
        stage_metric("units_per_second", "Rate of all ranks together.", [one.per_second for one in stages]),
        stage_metric("left_seconds", "Time left at this rate.", [one.seconds_left for one in stages]),
        stage_metric("size_bytes", "Size of the files of its units.", [one.num_bytes for one in stages]),
        stage_metric(
            "slowest_rank_ratio",
            "Seconds a unit of the slowest rank over those of the median rank.",
            [None if one.slowest is None else one.slowest.factor for one in stages],
        ),
        stage_metric(
            "last_error_timestamp_seconds",
            "When a rank of its last start failed.",
            [None if one.error is None else one.error.time for one in stages],
        ),
        _Metric(
            name="mlpmem_stage_ranks",
            help="Ranks of the last start by state.",
            samples=[
                ({**labels, "state": state}, sum(rank.state == state for rank in stage.ranks))
                for labels, stage in places
                for state in get_args(RankState)
            ],
        ),
        _Metric(
            name="mlpmem_disk_size_bytes", help="File system of the run.", samples=[(run_labels, disk_bytes)]
        ),
        _Metric(name="mlpmem_disk_free_bytes", help="Free space there.", samples=[(run_labels, free_bytes)]),
        _Metric(
            name="mlpmem_look_timestamp_seconds", help="When this was written.", samples=[(run_labels, time)]
        ),
    ]
    return "".join(f"{line}\n" for metric in metrics if metric.samples for line in metric.lines())


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text
