"""Part of `inspect_run`: how far a stage is, from the lines that its ranks write to log.jsonl.

The first look at a stage lists the folders of its records once, because a line may have been lost in a crash;
all later looks read what was added to the logs. So a look costs as much as there is new, and never as many
operations as there are units. Rates come from the times of one rank's own events. Clocks of hosts are
compared for the time since a rank's last sign of life, and where a job moved to other hosts: which of a
rank's starts is the latest, and which log's lines are earlier.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlpmem_ds.core.claims import has_ended, is_of_this_machine
from mlpmem_ds.core.errors import LOST_RANK, DamagedDataError
from mlpmem_ds.core.file_lists import files_of
from mlpmem_ds.core.files import read_sealed_json
from mlpmem_ds.core.log import is_event
from mlpmem_ds.core.objects.contents import CHECKPOINTS
from mlpmem_ds.formats.checkpoint import list_checkpoints, read_checkpoint
from mlpmem_ds.stages.inspection.tail import LineTail

RankState = Literal["working", "silent", "finished", "stopped", "failed", "gone"]
StageState = Literal["complete", "working", "failed", "stopped", "killed", "not complete"]
_NUM_RECENT = 20
"""units or log lines of a rank of which its rate is the mean"""
_MIN_SECONDS_SILENT = 600.0
_UNITS_SILENT = 4
"""a rank of another host is called silent after the longer of ten minutes and four of its units"""
_MIN_FACTOR = 1.2
"""a rank this much slower than the median of all is a straggler"""
_INTERRUPTED = (130, 143)
_SECONDS_OF_A_START = 60.0
"""ranks of one launch do not start at the same moment"""


@dataclass(frozen=True, kw_only=True)
class RankProgress:
    """One rank of the latest start."""

    rank: int
    host: str
    state: RankState
    units: int
    """made since it started"""
    seconds_per_unit: float | None
    seconds_since_sign: float
    """since its last line in the log"""


@dataclass(frozen=True, kw_only=True)
class Slowest:
    """The slowest of the ranks at work, and how many times the median rank's seconds it takes a unit."""

    rank: int
    host: str
    factor: float


@dataclass(frozen=True, kw_only=True)
class LastError:
    """What the last rank said that failed: the line that it ended with, remedy included."""

    time: float
    rank: int
    code: int
    message: str


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """A stage at one moment."""

    root: Path
    name: str
    state: StageState
    of: str
    """what is counted: `units`, or the `steps` of a training"""
    done: int
    total: int | None
    """None: not known yet"""
    per_second: float | None
    """of all ranks together; None where none is at work, or none has finished one"""
    seconds_left: float | None
    ranks: tuple[RankProgress, ...]
    slowest: Slowest | None
    error: LastError | None
    """None also when the stage was completed since"""
    num_bytes: int
    """of the files of its units, and of its checkpoints"""
    started: float | None
    """Unix seconds of its first start"""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("root", "name")}


@dataclass
class _Rank:
    """What one rank's events said since it started."""

    rank: int
    process: str
    world: int
    started: float
    last: float
    units: int = 0
    total: int = 0
    state: RankState | None = None
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_RECENT))
    seconds: float | None = None

    @property
    def seconds_per_unit(self) -> float | None:
        if len(self.times) > 1:
            return max(self.times[-1] - self.times[0], 1e-3) / (len(self.times) - 1)
        return self.seconds

    def progress(self, now: float) -> RankProgress:
        silence, each = max(0.0, now - self.last), self.seconds_per_unit
        state = self.state
        if state is None:
            patience = max(_MIN_SECONDS_SILENT, _UNITS_SILENT * (each or 0.0))
            is_silent = silence > patience and not is_of_this_machine(self.process)
            state = "gone" if has_ended(self.process) else "silent" if is_silent else "working"
        return RankProgress(
            rank=self.rank,
            host=self.process.partition(" ")[0] or "?",
            state=state,
            units=self.units,
            seconds_per_unit=each,
            seconds_since_sign=silence,
        )


class StageWatch:
    """Follows one stage directory. `look` is called again and again; `open_logs` when it may have more of
    them."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        self._tails: dict[str, LineTail] = {}
        self._metrics = LineTail(root / "metrics.jsonl")
        self._is_complete = False
        self._begin()

    def _begin(self) -> None:
        """Nothing is known but the records."""
        self._units = set(_recorded(self.root / "done"))
        self._bytes_of: dict[str, int] = {}
        self._ranks: dict[int, _Rank] = {}  # the latest start of each
        self._starts: dict[tuple[str, int], _Rank] = {}  # of each in each log: its next lines are this one's
        self._of, self._num_steps = "units", 0
        self._steps: deque[tuple[int, float]] = deque(maxlen=_NUM_RECENT)
        self._error: LastError | None = None
        self._started: float | None = None
        self._stored_bytes: int | None = None
        self._checkpoint_bytes, self._has_new_checkpoint = 0, True

    def open_logs(self) -> None:
        """Find the logs of all hosts: one listing."""
        with contextlib.suppress(OSError), os.scandir(self.root) as entries:
            for entry in entries:
                if entry.name == "log.jsonl" or (
                    entry.name.startswith("log-") and entry.name.endswith(".jsonl")
                ):
                    self._tails.setdefault(entry.name, LineTail(self.root / entry.name))

    @property
    def is_idle(self) -> bool:
        """Complete: looked at seldom."""
        return self._is_complete

    def look(self) -> StageProgress:
        """One open a log, and one question for the manifest."""
        found = {name: tail.read() for name, tail in self._tails.items()}
        if any(is_anew for _, is_anew in found.values()):  # the directory was removed, and begun again
            self._begin()
            self._tails = {name: LineTail(self.root / name) for name in self._tails}
            found = {name: tail.read() for name, tail in self._tails.items()}
        logs = [[(line, name) for line in filter(is_event, lines)] for name, (lines, _) in found.items()]
        # Each log in its own order, and what several hosts wrote by time.
        for event, log in heapq.merge(*logs, key=lambda one: float(one[0]["time"])):
            with contextlib.suppress(KeyError, TypeError, ValueError):  # a line that no stage wrote
                self._apply(event, log)
        was_complete, self._is_complete = self._is_complete, (self.root / "manifest.json").is_file()
        if self._is_complete and not was_complete:
            self._stored_bytes = _bytes_of_manifest(self.root)
        if self._of == "steps":
            self._read_steps()
            if self._has_new_checkpoint:
                self._has_new_checkpoint = False
                self._checkpoint_bytes = _bytes_of_checkpoints(self.root / CHECKPOINTS)
        return self._progress(time.time())

    def _apply(self, event: Mapping[str, Any], log: str) -> None:
        kind, moment, number = str(event["event"]), float(event["time"]), int(event["rank"])
        if kind == "started":
            rank = _Rank(
                rank=number,
                process=str(event.get("process", "")),
                world=int(event["world"]),
                started=moment,
                last=moment,
            )
            self._starts[log, number] = rank
            if number not in self._ranks or moment >= self._ranks[number].started:
                self._ranks[number] = rank
            self._started = moment if self._started is None else min(self._started, moment)
        elif kind == "discarded":
            for unit in event["units"]:
                self._units.discard(unit)
                self._bytes_of.pop(unit, None)
            return
        if (log, number) not in self._starts:
            return
        rank = self._starts[log, number]
        rank.last = moment
        if kind == "phase":
            rank.times.clear()
            rank.seconds = None
            if event["of"] == "steps":
                self._of, self._num_steps = "steps", int(event["count"])
            else:
                rank.total += int(event["count"])
        elif kind == "unit":
            self._units.add(event["unit"])
            self._bytes_of[event["unit"]] = int(event.get("bytes", 0))
            rank.units += 1
            rank.times.append(moment)
            rank.seconds = float(event["seconds"])
        elif kind in ("finished", "stopped"):
            rank.state = "finished" if kind == "finished" else "stopped"
        elif kind == "complete":
            self._error = None
        elif kind == "ended":
            code = int(event["code"])
            rank.state = "stopped" if code in _INTERRUPTED else "failed"
            is_latest = rank is self._ranks[number]
            if rank.state == "failed" and is_latest and not (code == LOST_RANK and self._has_cause()):
                self._error = LastError(time=moment, rank=number, code=code, message=str(event["message"]))
        elif kind == "checkpoint":
            self._has_new_checkpoint = True

    def _has_cause(self) -> bool:
        """Whether a rank of the latest start has said what failed: of the others, that it is gone, says
        less."""
        error = self._error
        begun = max((rank.started for rank in self._ranks.values()), default=0.0)
        return error is not None and error.code != LOST_RANK and error.time >= begun - _SECONDS_OF_A_START

    def _read_steps(self) -> None:
        lines, is_anew = self._metrics.read()
        if is_anew:
            self._steps.clear()
        for line in lines:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                step, moment = int(line["step"]), float(line["time"])
                while self._steps and self._steps[-1][0] >= step:  # a validation has the step's number too
                    self._steps.pop()
                self._steps.append((step, moment))
                for rank in self._ranks.values():  # they go in step: a sign of one is one of all
                    rank.last = max(rank.last, moment)

    def _progress(self, now: float) -> StageProgress:
        world = max(((rank.started, rank.world) for rank in self._ranks.values()), default=(0.0, 1))[1]
        alive = [rank for number, rank in sorted(self._ranks.items()) if number < world]
        ranks = tuple(rank.progress(now) for rank in alive)
        state = self._state(ranks)
        at_work = [rank for rank in ranks if rank.state == "working"]
        total: int | None = self._num_steps
        if self._of == "steps":
            at_work = [rank for rank in at_work if not self._is_complete]
            done = self._steps[-1][0] if self._steps else 0
            since = self._ranks[0].started if 0 in self._ranks else 0.0
            rate = _rate_of_steps(self._steps, since=since) if at_work else None
        else:
            done = len(self._units)
            total = done if self._is_complete else max((rank.total for rank in alive), default=0) or None
            rate = sum(1 / each for rank in at_work if (each := rank.seconds_per_unit)) or None
        left = max(0, total - done) if total is not None else None
        is_working = state == "working"
        return StageProgress(
            root=self.root,
            name=self.name,
            state=state,
            of=self._of,
            done=done if total is None else min(done, total),
            total=total,
            per_second=rate if is_working else None,
            seconds_left=left / rate if is_working and rate and left is not None else None,
            ranks=ranks,
            slowest=_slowest(at_work) if is_working and self._of == "units" else None,
            error=None if self._is_complete else self._error,
            num_bytes=self._num_bytes(),
            started=self._started,
        )

    def _num_bytes(self) -> int:
        made = sum(self._bytes_of.values())
        stored = self._stored_bytes if self._is_complete and self._stored_bytes is not None else made
        return stored + self._checkpoint_bytes

    def _state(self, ranks: Sequence[RankProgress]) -> StageState:
        if self._is_complete:
            return "complete"
        states = {rank.state for rank in ranks}
        if states & {"working", "silent"}:
            return "working"
        if "failed" in states:
            return "failed"
        if "stopped" in states:
            return "stopped"
        return "killed" if "gone" in states else "not complete"


def _slowest(ranks: Sequence[RankProgress]) -> Slowest | None:
    """The rank with the most seconds a unit, if that is much more than the median; a rank whose unit has
    taken longer than its units before counts by that."""
    seconds = {rank.rank: _current_seconds(rank) for rank in ranks}
    times = {number: each for number, each in seconds.items() if each is not None}
    if len(times) < 2:
        return None
    number = max(times, key=lambda one: times[one])
    factor = times[number] / statistics.median(times.values())
    (host,) = (rank.host for rank in ranks if rank.rank == number)
    return Slowest(rank=number, host=host, factor=factor) if factor >= _MIN_FACTOR else None


def _current_seconds(rank: RankProgress) -> float | None:
    if rank.seconds_per_unit is None:
        return None
    return max(rank.seconds_per_unit, rank.seconds_since_sign)


def _rate_of_steps(steps: Sequence[tuple[int, float]], *, since: float) -> float | None:
    """By the latest start alone, `since` it began: the time in which no rank ran is no time of a step."""
    recent = [(step, moment) for step, moment in steps if moment >= since]
    if len(recent) < 2:
        return None
    (first, begin), (last, end) = recent[0], recent[-1]
    return (last - first) / max(end - begin, 1e-3)


def _recorded(folder: Path) -> Iterator[str]:
    """The units with a record: one listing of each folder of a thousand."""
    for _, _, names in os.walk(folder):
        yield from (name[: -len(".json")] for name in names if name.endswith(".json") and name[0] != ".")


def _bytes_of_manifest(root: Path) -> int | None:
    """All files of a complete stage; None where its manifest cannot be read."""
    try:
        return files_of(read_sealed_json(root / "manifest.json"), root).num_bytes
    except DamagedDataError:
        return None


def _bytes_of_checkpoints(folder: Path) -> int:
    """All files of the checkpoints that are kept, as their manifests say: a few files, after each save."""
    total = 0
    for path in list_checkpoints(folder):
        with contextlib.suppress(DamagedDataError):  # removed meanwhile
            total += sum(file.bytes for file in read_checkpoint(path).manifest.files)
    return total
