"""SIGTERM, as Slurm, Kubernetes and `kill` send it: the process leaves as after Ctrl-C, and says so.

A training takes the signal itself meanwhile (engines/processes.py), to save before it ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from mlpmem_ds.core.streams import say

EXIT_CODE = 128 + signal.SIGTERM
MESSAGE = "error: stopped by SIGTERM; the same command continues where it was"
SECONDS_TO_ANSWER = 5.0
"""that a process may spend in one call of a library before a thread ends it"""


class Terminated(BaseException):
    """SIGTERM was received: raised in the main thread, so that temporary files are removed on the way out."""


class _Handler:
    """Raises `Terminated` once; a second SIGTERM ends the process at once."""

    def __init__(self) -> None:
        self.has_answered = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.has_answered = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated


@contextlib.contextmanager
def terminated_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated`; nothing is changed where it is ignored, or has a handler already.

    Python handles a signal between two of its steps, and a rank that waits for another inside a library has
    none for hours: after `SECONDS_TO_ANSWER` a thread ends the process.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    handler = _Handler()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, handler)
    former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, handler), name="sigterm", daemon=True).start()
    _prepare_forks()
    try:
        yield
    finally:
        handler.has_answered = True
        if signal.getsignal(signal.SIGTERM) is handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(former)
        os.close(writer)  # ends the thread


def _watch(reader: int, handler: _Handler) -> None:
    """End the process some seconds after a SIGTERM that the main thread does not get to."""
    with open(reader, "rb", buffering=0) as signals:
        while received := signals.read(1):
            if received[0] == signal.SIGTERM and not handler.has_answered:
                time.sleep(SECONDS_TO_ANSWER)
                if not handler.has_answered and signal.getsignal(signal.SIGTERM) is handler:
                    say(MESSAGE)
                    os._exit(EXIT_CODE)


@functools.cache
def _prepare_forks() -> None:
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """In a child: SIGTERM ends it as any process, and its parent's thread hears nothing of it."""
    if isinstance(signal.getsignal(signal.SIGTERM), _Handler):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
