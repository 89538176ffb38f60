"""Ranks that share only a folder: what they exchange are files that appear whole, by a rename.

How they meet: rank 0 makes a session, a folder with a random name, and offers it in `offer`; each other rank
writes a random word in it. When rank 0 has listed that word, the rank knows that the session is not one that
a killed launch left. Operation n is the folder n of the session; a rank removes its files of an operation
when it has seen every rank in the next one.

On NFS a listing may be half a minute old: an operation then takes so much longer, and is never wrong.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.claims import has_ended, holder
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.heartbeat import Heartbeat, wait_until
from mlpmem_ds.engines.collectives.ranks import Array, Ranks, RanksLost, culprits

_LONGEST_PAUSE_SECONDS = 1.0
_SECONDS_TO_MEET = 1800.0
_OFFER, _MEMBERS, _FAILED = "offer", "members", "failed-"
_LEFT = "has gone on alone, and removed what the ranks exchange"  # after it had seen that a third one failed


class SharedFolder(Ranks):
    """The ranks of one launch in the newest session of a folder."""

    def __init__(self, world: World, folder: Path, *, timeout_seconds: float) -> None:
        self.rank, self.size = world.rank, world.size
        self._timeout_seconds, self._operation = timeout_seconds, 0
        self._next_number: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._session = folder / secrets.token_hex(8)  # of rank 0; the others take that one over
        if world.is_first:
            self._offer()
        else:
            self._join()
        self._heartbeat = Heartbeat(self._give_sign, timeout_seconds)

    # -- meeting

    def _offer(self) -> None:
        former = [path for path in self._folder.iterdir() if path.is_dir()]
        self._session.mkdir()
        _publish(self._folder / _OFFER, self._session.name)
        for path in former:
            shutil.rmtree(path, ignore_errors=True)
        others = range(1, self.size)
        self._wait_for({rank: self._session / f"hello-{rank}" for rank in others}, _SECONDS_TO_MEET)
        words = [""] + [_read(self._session / f"hello-{rank}") for rank in others]
        _publish(self._session / _MEMBERS, words)

    def _join(self) -> None:
        word, greeted = secrets.token_hex(8), ""

        def is_member() -> bool:
            nonlocal greeted
            # Not offered yet, or just removed; or the session of a former launch of fewer ranks.
            with contextlib.suppress(OSError, IndexError):
                name = _read(self._folder / _OFFER)
                if name != greeted:
                    self._session = self._folder / name
                    _publish(self._session / f"hello-{self.rank}", word)
                    greeted = name
                return bool(_read(self._session / _MEMBERS)[self.rank] == word)
            return False

        wait_until(
            is_member,
            awaited=lambda: [0],
            sign_of=lambda rank: greeted,
            timeout_seconds=max(self._timeout_seconds, _SECONDS_TO_MEET),
            longest_pause_seconds=_LONGEST_PAUSE_SECONDS,
        )

    # -- operations

    def sum(self, array: Array) -> Array:
        """Each rank adds up one part of the array, and all gather the parts."""
        parts = np.array_split(np.ascontiguousarray(array).reshape(-1), self.size)
        received = self.exchange(parts)
        total = received[0].copy()
        for part in received[1:]:
            total += part
        return np.concatenate(self.gather(total)).reshape(array.shape)

    def gather(self, value: Any) -> list[Any]:
        step = self._begin()
        _publish(step / f"{self.rank}", value)
        files = self._end({rank: step / f"{rank}" for rank in self._others()})
        return [value if rank == self.rank else _read(files[rank]) for rank in range(self.size)]

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        assert len(parts) == self.size, (len(parts), self.size)
        step = self._begin()
        for rank in self._others():
            _publish(step / f"{self.rank}-{rank}", np.asarray(parts[rank], order="C"))
        files = self._end({rank: step / f"{rank}-{self.rank}" for rank in self._others()})
        return [part if rank == self.rank else _read(files[rank]) for rank, part in enumerate(parts)]

    def next_number(self, counter: str) -> int:
        folder = self._session / f"counter-{counter}"
        number = self._next_number.get(counter, 0)
        try:
            folder.mkdir(exist_ok=True)
            while not _is_new(folder / str(number)):
                number = max([number, *map(int, os.listdir(folder))]) + 1
        except FileNotFoundError as error:
            raise RanksLost((), _LEFT) from error
        self._next_number[counter] = number + 1
        return number

    def wait(self) -> None:
        self.gather(None)

    def close(self) -> None:
        self.wait()
        self._heartbeat.stop()  # first: rank 0 removes the folder when all have left
        _publish(self._session / f"left-{self.rank}", None)
        if self.rank == 0:
            self._wait_for(
                {rank: self._session / f"left-{rank}" for rank in self._others()}, self._timeout_seconds
            )
            shutil.rmtree(self._folder, ignore_errors=True)

    def fail(self, error: BaseException | None = None) -> None:
        with contextlib.suppress(OSError):
            _publish(self._session / f"{_FAILED}{self.rank}", culprits(self.rank, error))
        self._heartbeat.stop()

    # -- parts of them

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _begin(self) -> Path:
        self._operation += 1
        step = self._session / str(self._operation)
        try:
            step.mkdir(exist_ok=True)
        except FileNotFoundError as error:
            raise RanksLost((), _LEFT) from error
        return step

    def _end(self, files: dict[int, Path]) -> dict[int, Path]:
        """Wait for the files of the other ranks, and give them back.

        All ranks have by then read what this one wrote for the operation before.
        """
        self._wait_for(files, self._timeout_seconds)
        former = self._session / str(self._operation - 1)
        for end in ("", *(f"-{rank}" for rank in self._others())):
            (former / f"{self.rank}{end}").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the last rank to leave it removes it
            former.rmdir()
        return files

    def _wait_for(self, files: dict[int, Path], timeout_seconds: float) -> None:
        """Until these files, of one folder, are there: one listing a look, no look at each file."""
        missing = dict(files)

        def is_over() -> bool:
            try:
                names = {name for path in list(missing.values())[:1] for name in os.listdir(path.parent)}
                in_session = os.listdir(self._session)
            except FileNotFoundError as error:
                raise RanksLost(sorted(missing), _LEFT) from error
            for rank in [rank for rank, path in missing.items() if path.name in names]:
                del missing[rank]
            failed = [name for name in in_session if name.startswith(_FAILED)]
            if missing and failed:
                lost = {rank for name in failed for rank in _read(self._session / name)}
                hosts = {rank: self._host_of(rank) for rank in lost}
                raise RanksLost(sorted(lost), "has failed", hosts=hosts)
            return not missing

        wait_until(
            is_over,
            awaited=lambda: missing,
            sign_of=self._sign_of,
            has_ended=self._has_ended,
            host_of=self._host_of,
            timeout_seconds=timeout_seconds,
            longest_pause_seconds=_LONGEST_PAUSE_SECONDS,
        )

    def _give_sign(self, number: int) -> None:
        """Which process this is, and a number that grows; written in place: opening a file to read it is what
        makes NFS look at it anew."""
        (self._session / f"sign-{self.rank}").write_text(f"{holder(os.getpid())}\n{number}", encoding="utf-8")

    def _sign_of(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            return (self._session / f"sign-{rank}").read_text(encoding="utf-8")
        return ""

    def _host_of(self, rank: int) -> str:
        return self._sign_of(rank).partition(" ")[0]

    def _has_ended(self, rank: int) -> bool:
        process, end_of_line, _ = self._sign_of(rank).partition("\n")
        return bool(end_of_line) and has_ended(process)  # half a sign may name another process


def _is_new(path: Path) -> bool:
    """Make an empty file; False where there is one."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    return True


def _publish(path: Path, value: Any) -> None:
    """Not flushed to the disk: after a crash all ranks start again, with a new session."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "wb") as stream:
        pickle.dump(value, stream, protocol=5)
    os.replace(temporary, path)


def _read(path: Path) -> Any:
    with open(path, "rb") as stream:
        return pickle.load(stream)
