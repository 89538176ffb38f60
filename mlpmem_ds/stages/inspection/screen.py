"""Part of `inspect_run --watch`: a run on one screen, or as lines where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlpmem_ds.core.files import size_in_words
from mlpmem_ds.engines.terminal import open_table
from mlpmem_ds.stages.inspection.progress import StageProgress

Show = Callable[[Sequence[StageProgress], Path, int], None]
_STYLES = {"failed": "red", "killed": "red", "working": "bold"}
COLUMNS = ("stage", "state", "done", "rate", "time left", "ranks", "slowest", "on disk")


@contextlib.contextmanager
def open_screen() -> Iterator[Show]:
    """What shows the stages of a run, its directory and the free bytes there: one screen of a terminal, drawn
    anew each time; elsewhere a line for each stage that has changed."""
    if not sys.stdout.isatty():
        yield _Lines().show
        return
    with open_table(COLUMNS) as draw:

        def show(stages: Sequence[StageProgress], run: Path, free_bytes: int) -> None:
            moment = time.strftime("%H:%M:%S")
            heading = f"{run}   {moment}   {size_in_words(free_bytes)} free   (Ctrl-C ends the watch)"
            rows = [(cells_of(stage), _STYLES.get(stage.state, "")) for stage in stages]
            draw(heading, rows, remarks_of(stages))

        yield show


class _Lines:
    """Writes the stages that have changed since the last time, or that are at work."""

    def __init__(self) -> None:
        self._shown: dict[Path, str] = {}

    def show(self, stages: Sequence[StageProgress], run: Path, free_bytes: int) -> None:
        lines = []
        for stage in stages:
            words = dict(zip(COLUMNS[1:], cells_of(stage)[1:], strict=True))
            shown = ", ".join(f"{name} {text}" for name, text in words.items() if text)
            line = "; ".join([f"{stage.name}: {shown}", *remarks_of([stage])])
            if self._shown.get(stage.root) != line:
                lines.append(line)
            self._shown[stage.root] = line
        if lines:
            free = f"{size_in_words(free_bytes)} free"
            sys.stdout.write("".join(f"{time.strftime('%H:%M:%S')} {line}; {free}\n" for line in lines))
            sys.stdout.flush()


def cells_of(stage: StageProgress) -> tuple[str, ...]:
    """A stage in the words of `COLUMNS`."""
    total = "?" if stage.total is None else f"{stage.total:,}"
    states = [rank.state for rank in stage.ranks]
    ranks = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    slowest = stage.slowest
    return (
        stage.name,
        stage.state,
        f"{stage.done:,} of {total} {stage.of}",
        "" if stage.per_second is None else _rate(stage.per_second, stage.of),
        "" if stage.seconds_left is None else duration(stage.seconds_left),
        "" if stage.state == "complete" else ranks,
        ""
        if slowest is None
        else f"rank {slowest.rank} ({slowest.host}) takes {slowest.factor:.1f} times as long",
        size_in_words(stage.num_bytes),
    )


def remarks_of(stages: Sequence[StageProgress]) -> list[str]:
    """Ranks that give no sign, and what failed, with the remedy that it named."""
    remarks = []
    for stage in stages:
        for rank in stage.ranks:
            if rank.state == "silent" and stage.state != "complete":
                silence = duration(rank.seconds_since_sign)
                remarks.append(
                    f"{stage.name}: rank {rank.rank} ({rank.host}) has given no sign of life for {silence}"
                )
        if stage.error is not None:
            moment = time.strftime("%H:%M:%S", time.localtime(stage.error.time))
            ended = f"rank {stage.error.rank} ended at {moment} with exit code {stage.error.code}"
            remarks.append(f"{stage.name}: {ended}: {stage.error.message}")
        if stage.state == "killed":
            remarks.append(f"{stage.name}: its processes are gone: the same command continues")
    return remarks


def _rate(per_second: float, of: str) -> str:
    for unit, seconds in (("s", 1), ("min", 60), ("h", 3600)):
        if per_second * seconds >= 1 or unit == "h":
            return f"{per_second * seconds:,.1f} {of}/{unit}"
    raise AssertionError("no unit of time")


def duration(seconds: float) -> str:
    """Two units that show it: `2 d 04 h`, `1 h 05 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    for size, name, smaller, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size:,} {name} {whole % size // smaller:02d} {below}"
    return f"{whole} s"
