"""What a run says: a progress line on a terminal, plain lines elsewhere, JSON lines in the stage's
log.jsonl."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.files import naming
from mlpmem_ds.core.host import boot_id, host_name
from mlpmem_ds.core.world import World

_SECONDS_BETWEEN_LINES = 10.0


def set_up_logging(world: World, *, name: str) -> None:
    """Send the library's messages to standard error: from rank 0 all of them, from the others warnings
    only."""
    prefix = name if world.size == 1 else f"{name} rank {world.rank}"
    logging.basicConfig(
        level=logging.WARNING,
        format=f"%(asctime)s {prefix}: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("mlpmem_ds").setLevel(_shown_level(world))
    # Out of reach they warn at each attempt, gcsfs with a traceback at the last; what fails in the end is
    # said by the caller.
    for library in ("huggingface_hub.utils._http", "google.auth"):
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def log_for_all(logger: logging.Logger, world: World, message: str, *values: object) -> None:
    """Log what one rank says for all of them, whichever it is: information of ranks above 0 is not shown."""
    logger.log(_shown_level(world), message, *values, stacklevel=2)


def _shown_level(world: World) -> int:
    return logging.INFO if world.is_first else logging.WARNING


_begun: list[EventLog] = []
"""of the stages that this process has begun since its command started, the latest last"""


class EventLog:
    """Appends one JSON object a line to `path`; lines of several ranks may interleave but never mix.

    Ranks of other hosts than rank 0's have a file each machine, `log-<host>-<boot>.jsonl` (core/host.py):
    appends of two clients of a network file system may overwrite each other.
    """

    def __init__(self, path: Path, world: World) -> None:
        own = path.with_name(f"{path.stem}-{host_name()}-{boot_id()}{path.suffix}")
        self._path = path if world.is_on_first_host else own
        self._rank = world.rank

    def write(self, event: str, **fields: Any) -> None:
        record = {"time": round(time.time(), 3), "rank": self._rank, "event": event, **fields}
        append_json_line(self._path, record)

    def begin(self, **fields: Any) -> None:
        """Write `started`: from now on an end of this process before its time is noted here."""
        self.write("started", **fields)
        _begun.append(self)

    def finish(self, **fields: Any) -> None:
        """Write `finished`; an end of this process is from now on that of another stage which it began, if
        any."""
        self.write("finished", **fields)
        if self in _begun and len(_begun) > 1:
            _begun.remove(self)

    @property
    def is_there(self) -> bool:
        """Whether the file still exists: a stage that gives up removes it."""
        return self._path.is_file()


def forget_begun() -> None:
    """A command starts: what the process did before is none of its affair."""
    _begun.clear()


def log_end(code: int, message: str) -> None:
    """Note in the stage that this process began last, if any, why the process ends: exit code and message."""
    with contextlib.suppress(OSError):  # the disk may be full, or away: the message is shown anyway
        if _begun and _begun[-1].is_there:
            _begun[-1].write("ended", code=code, message=message)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a log.jsonl and of those of other hosts next to it, each file's in its order; [] where
    there is no file. Lines that a crash cut short or that are damaged are left out: each event that is
    returned has its `event` (str), `rank` (int) and `time` (a number)."""
    paths = [path, *sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))]
    return [event for each in paths for event in read_json_lines(each) if is_event(event)]


def is_event(line: Mapping[str, Any]) -> bool:
    """Whether a line of such a file has what every event has, and is not damaged there."""
    moment = line.get("time")
    is_time = isinstance(moment, (int, float)) and math.isfinite(moment)
    return is_time and isinstance(line.get("event"), str) and type(line.get("rank")) is int


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """One object more in a file that grows by lines. Behind a line that a crash or a full disk cut short it
    begins a line of its own; lines of several processes never mix."""
    line = json.dumps(value).encode() + b"\n"
    with naming(path), open(path, "a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read().endswith(b"\n") else b"\n" + line
        stream.write(line)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of ours that grows by lines, without lines that a crash cut short or damaged; []
    where there is no file."""
    return parse_json_lines(path.read_bytes() if path.is_file() else b"")


def parse_json_lines(content: bytes) -> list[dict[str, Any]]:
    """The objects of such a file's content."""
    objects = []
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                objects.append(value)
    return objects


@dataclass(kw_only=True)
class _Start:
    """A start of one rank, at work from its `started` to its last event before the next.

    Attributes:
        world: ranks that were started together; None where the log does not say it.
        begin, end: seconds since 1970.
    """

    world: int | None
    begin: float
    end: float


def _starts_of_stage(root: Path) -> list[_Start]:
    starts: list[_Start] = []
    latest: dict[int, _Start] = {}
    for event in read_events(root / "log.jsonl"):
        rank, moment, world = event["rank"], event["time"], event.get("world")
        if event["event"] == "started":
            is_count = type(world) is int and world > 0
            latest[rank] = _Start(world=world if is_count else None, begin=moment, end=moment)
            starts.append(latest[rank])
        elif rank in latest:
            latest[rank].end = moment
    return starts


def seconds_of_stage(root: Path) -> float | None:
    """Wall-clock seconds that a stage's runs took, from its log.jsonl; None without one.

    Where ranks overlap, time counts once. So the runs of a resumed stage add up, a killed run's up to its
    last event.
    """
    starts = _starts_of_stage(root)
    total, reached = 0.0, float("-inf")
    for start in sorted(starts, key=lambda start: start.begin):
        total += max(0.0, start.end - max(start.begin, reached))
        reached = max(reached, start.end)
    return total if starts else None


def ranks_of_stage(root: Path) -> int | None:
    """As how many ranks a stage was made: of starts with different numbers that whose ranks were at work
    longest, all together; None where its log.jsonl does not say it."""
    seconds: dict[int, float] = defaultdict(float)
    for start in _starts_of_stage(root):
        if start.world is not None:
            seconds[start.world] += start.end - start.begin
    return max(seconds, key=lambda world: seconds[world], default=None)


def ranks_of_machine(root: Path, world: int) -> int | None:
    """The most ranks that a stage had on one machine when it was last started as `world` of them; None where
    its log.jsonl does not say it."""
    boots: dict[int, str] = {}  # of ranks: containers of one machine have other host names
    for event in sorted(read_events(root / "log.jsonl"), key=lambda event: event["time"]):
        words = str(event.get("process", "")).split()
        if event["event"] == "started" and event.get("world") == world and len(words) > 1:
            boots[event["rank"]] = words[1]
    return max(Counter(boots.values()).values(), default=None)


class Progress:
    """Counts work done: a tqdm bar on a terminal, else a log line with rate and time left every ten seconds
    (rank 0)."""

    def __init__(self, total: int, *, label: str, unit: str, world: World) -> None:
        self._total, self._label, self._unit = total, label, unit
        self._done = 0
        self._start = self._last = time.monotonic()
        self._logger = logging.getLogger("mlpmem_ds")
        self._speaks = world.is_first
        self._bar: Any = None
        if world.is_first and sys.stderr.isatty():
            from tqdm import tqdm  # not above: the message that a package is missing needs this module

            self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=True, dynamic_ncols=True)

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif (
            self._speaks
            and self._done != self._total
            and time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES
        ):
            self._last = time.monotonic()
            self._logger.info(self._line(note, is_last=False))

    def close(self, note: str = "") -> None:
        """End the bar, or say the last line: none where there was nothing to do."""
        if self._bar is not None:
            self._bar.set_postfix_str(note)
            self._bar.close()
        elif self._speaks and self._done:
            self._logger.info(self._line(note, is_last=True))

    def _line(self, note: str, *, is_last: bool) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._done / seconds
        has_rest = not is_last and 0 < self._done < self._total
        left = f", {(self._total - self._done) / rate:.0f} s left" if has_rest else ""
        total = max(
            self._total, self._done
        )  # units made again, or taken over from another rank, were not foreseen
        share = f"{self._label}: {self._done:,} of {total:,} {self._unit}"
        return f"{share} in {seconds:.0f} s ({rate:,.0f} {self._unit}/s{left}){' ' + note if note else ''}"
