"""Part of `goodput`: processes that run to their end while ranks among them are killed on a schedule.

Everything that is started carries a variable of its own, and is found by it in /proc, regardless of the
sessions and parents that launchers give it.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError, first_line

_MARK = "MLPMEM_GOODPUT"
_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_TO_LEAVE = 2.0
_KILL_OF_ALL = 2


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill -9."""

    seconds: float
    """after the kill before it, or the start; later where no rank runs then"""
    choice: float
    """in [0, 1): which of the ranks that run then"""
    is_whole: bool
    """all of them in its place"""


@dataclass(frozen=True, kw_only=True)
class KilledRun:
    """How a run went."""

    seconds: float
    kills: tuple[Mapping[str, Any], ...]
    """of each: seconds after the start, the ranks, and what `look` said right after"""
    orphans: int
    """processes that were left when the commands had ended"""


def schedule(every_seconds: float, seed: int) -> Iterator[Kill]:
    """Endless: a kill of a random rank every so many seconds; the second is one of all ranks."""
    generator = random.Random(seed)
    for number in count_from(1):
        yield Kill(seconds=every_seconds, choice=generator.random(), is_whole=number == _KILL_OF_ALL)


def run_under_kills(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]],
    kills: Iterator[Kill],
    *,
    log: Path,
    look: Callable[[], Mapping[str, Any]],
) -> KilledRun:
    """Start the commands (words, and variables besides those of this process) and kill until all have ended.

    Args:
        commands: those of one launch.
        kills: one after another; may be endless or empty.
        log: gets what they write, at its end.
        look: called right after each kill.

    Raises:
        UserError: a command ended with another exit code than 0; with the last line it wrote.
    """
    mark, done = f"{_MARK}={secrets.token_hex(8)}", []
    name, _, value = mark.partition("=")
    started = time.monotonic()
    with open(log, "ab", buffering=0) as stream:
        processes = [
            subprocess.Popen(
                words, env={**os.environ, **variables, name: value}, stdout=stream, stderr=stream
            )
            for words, variables in commands
        ]
        try:
            coming, last = next(kills, None), 0.0
            while any(process.poll() is None for process in processes):
                now = time.monotonic() - started
                if coming is not None and now >= last + coming.seconds and (ranks := ranks_of(mark)):
                    done.append({"seconds": round(now, 2), "ranks": _kill(coming, ranks), **look()})
                    coming, last = next(kills, None), now
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            seconds = time.monotonic() - started
        finally:
            orphans = _left(mark)
            for pid in orphans:
                _kill_one(pid)
    codes = [process.wait() for process in processes]
    if any(codes):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
        raise UserError(
            f"{' '.join(commands[0][0])} ended with exit code {next(filter(None, codes))}"
            f" ({first_line(lines[-1])}): {log} has all that it said"
        )
    return KilledRun(seconds=seconds, kills=tuple(done), orphans=len(orphans))


def ranks_of(mark: str) -> dict[int, int]:
    """Rank → its process, of those that are Python and know their rank."""
    ranks: dict[int, int] = {}
    for pid, variables in sorted(_marked(mark)):
        rank = next((word[5:] for word in variables if word.startswith(b"RANK=")), b"")
        if rank.isdigit() and _program(pid).startswith("python"):
            ranks.setdefault(int(rank), pid)  # what a rank starts comes after it
    return ranks


def _kill(kill: Kill, ranks: Mapping[int, int]) -> list[int]:
    """The ranks that were killed."""
    numbers = sorted(ranks)
    victims = numbers if kill.is_whole else [numbers[int(kill.choice * len(numbers))]]
    for rank in victims:
        _kill_one(ranks[rank])
    return victims


def _kill_one(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signal.SIGKILL)


def _left(mark: str) -> list[int]:
    """The processes that are still there some time after the end."""
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    while (pids := [pid for pid, _ in _marked(mark)]) and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return pids


def _marked(mark: str) -> Iterator[tuple[int, list[bytes]]]:
    """(process, its variables) of those that carry the mark; a zombie has no variables."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # another user's, or it has ended
                continue
            if mark.encode() in variables:
                yield int(folder.name), variables


def _program(pid: int) -> str:
    """The name of the program that a process runs; "" where it has ended."""
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:
        return ""
