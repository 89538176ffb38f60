"""A function called for many numbers in a child process: none can hang, crash or fill the memory of the
caller."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")


class Lost(NamedTuple):
    """A number whose call did not return."""

    reason: str


def call_bounded(
    function: Callable[[int], Result], count: int, *, seconds: float, num_bytes: int
) -> Iterator[Result | Lost]:
    """What `function` returns for 0 … count-1, in this order; a number that is lost costs a new child.

    Args:
        function: returns what can be pickled. It is called in one child process as long as it returns.
        count: of the numbers.
        seconds: limit of one call.
        num_bytes: of memory that the child may take in addition to what it has at its start; above it
            allocations fail.
    """
    number = 0
    while number < count:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(
            target=_call_all, args=(function, number, count, num_bytes, sender), daemon=True
        )
        child.start()
        sender.close()
        try:
            while number < count:
                if not receiver.poll(seconds):
                    yield Lost(f"no answer within {seconds:g} s")
                    number += 1
                    break
                try:
                    result: Any = receiver.recv()
                except EOFError:
                    child.join()
                    yield Lost(f"the process ended ({_end_of(child.exitcode)})")
                    number += 1
                    break
                yield result
                number += 1
        finally:
            child.kill()
            child.join()
            receiver.close()


def _call_all(
    function: Callable[[int], Any], start: int, stop: int, num_bytes: int, sender: Connection
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    limit = _address_space() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(start, stop):
        sender.send(function(number))


def _address_space() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()


def _end_of(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"signal {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"
