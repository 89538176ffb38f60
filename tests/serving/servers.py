"""Servers of real engines, as processes of a test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

START_SECONDS = 1800.0  # an engine imports gigabytes, on a machine that may be busy


@contextmanager
def running(words: Sequence[str], log: Path, **environment: str) -> Iterator[str]:
    """The address of `python WORDS --port P` when it answers; it is told to end afterwards.

    Meanwhile this process, and clients made in it, ask it past any proxy that the environment names.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, *words, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    try:
        with pytest.MonkeyPatch.context() as patched:
            for name in ("NO_PROXY", "no_proxy"):
                patched.setenv(name, "127.0.0.1")
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text(encoding="utf-8", errors="replace")[-4000:])
