"""Part of `quality`: front-ends in child processes that start in a fraction of a second.

They are forked from a server that has imported the libraries, which takes seconds and is done once; it ends
with this process, however that ends, and then its children are told to end too.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

_PRELOADED = (
    "torch",
    "transformers",
    "deepspeed",
    "mlpmem_ds.stages.evaluation.evaluate",
    "mlpmem_ds.stages.training.train",
)
_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


class Child(Protocol):
    """A process that runs one front-end."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def terminate(self) -> None:
        """Ask it to save and end (SIGTERM)."""

    def kill(self) -> None:
        """End it at once."""

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after at most so many seconds."""


Launch = Callable[[Sequence[str], Path, int], Child]
"""starts the front-end with these words, and so many threads; what it writes to its streams goes to the end
of a file"""


@dataclass(frozen=True, kw_only=True)
class _Forked:
    """A process of multiprocessing."""

    process: Any

    def poll(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()

    def wait(self, seconds: float) -> bool:
        self.process.join(seconds)
        return self.process.exitcode is not None


def make_launcher(preloaded: Sequence[str] = _PRELOADED) -> Launch:
    """A launcher of children; their environment is set here, as libraries read it when imported."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin slow a shared machine many times
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))

    def launch(words: Sequence[str], log: Path, threads: int) -> Child:
        process = context.Process(target=_run_front_end, args=(list(words), str(log), threads))
        process.start()
        return _Forked(process=process)

    return launch


def _run_front_end(words: list[str], log: str, threads: int) -> None:
    """In the child: `python -m mlpmem_ds WORDS`, its streams in a file."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    with open(log, "ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of faiss, which is imported later
    torch.set_num_threads(threads)
    sys.argv = ["mlpmem_ds", *words]
    runpy.run_module("mlpmem_ds", run_name="__main__", alter_sys=True)
