"""Part of `quality`: the plan's jobs, each a front-end in a child process, some at a time.

A job's output is a stage directory, so a job that was killed continues. One that is complete is not started
again, unless what it read is no longer the same: then its stage refuses, or finds that it is. A child ends
with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmem_ds.benchmarks.quality.children import Child, Launch, make_launcher
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import content_hash, publish_json, read_json, sha256_of_file
from mlpmem_ds.core.log import seconds_of_stage
from mlpmem_ds.core.manifest import is_own_directory
from mlpmem_ds.core.objects.listing import LAST_FILES
from mlpmem_ds.formats.input_files import find_files

_logger = logging.getLogger("mlpmem_ds.benchmarks")
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_END = 30.0  # a training saves what it has
_INPUT_FLAGS = ("--tokenizer", "--model", "--ds_config", "--questions")
"""of the plan's commands: those that may name what no job makes, next to --input"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage of the plan."""

    name: str
    """its output below the benchmark's, with folders: `domain/memory-0`"""
    words: tuple[str, ...]
    """the command and its flags, without --output"""
    needs: tuple[str, ...] = ()
    """jobs that must be complete before it"""
    expected_seconds: float = 0.0
    """on one core, for what is printed of the time left"""
    last_file: str = "manifest.json"
    """of its output: it is there when the job is complete"""
    budget_of: tuple[str, ...] = ()
    """its --time-budget-seconds are what these jobs took together; they are among `needs`"""


@dataclass(kw_only=True)
class JobRunner:
    """Runs jobs below one folder, and knows which are complete.

    Attributes:
        root: the benchmark's output.
        at_once: child processes at a time.
        cores: that the children share.
        launch: starts one.
    """

    root: Path
    at_once: int
    cores: int
    launch: Launch
    _running: dict[str, Child] = field(default_factory=dict)
    _inputs_at_start: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run what is not complete, in the order of the list as far as the needs allow.

        Raises:
            UserError: a job failed; with its last line and the file that has all it said.
        """
        waiting = {job.name: job for job in jobs if self.seconds(job) is None}
        started = time.monotonic()
        _logger.info(
            "%d of %d jobs are to be done, %s", len(waiting), len(jobs), self._time_left(waiting.values())
        )
        by_name, num_done = {job.name: job for job in jobs}, len(jobs) - len(waiting)
        with self._children_ended():
            while waiting or self._running:
                ready = self._ready(waiting)
                num_running = len(self._running) + len(ready)
                for job in ready:
                    del waiting[job.name]
                    # A job that runs alone, such as the base, has all cores.
                    self._start(job, threads=max(1, self.cores // num_running))
                for name in self._ended():
                    num_done += 1
                    seconds = self._finish(by_name[name])
                    left = [*waiting.values(), *(by_name[other] for other in self._running)]
                    _logger.info(
                        "%d of %d, %s: %.0f s; %.0f s so far, %s",
                        *(num_done, len(jobs), name, seconds, time.monotonic() - started),
                        self._time_left(left),
                    )
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def seconds(self, job: Job) -> float | None:
        """That a complete job took, over all its starts; None where it is not complete, or was another."""
        record = self._record_of(job.name)
        is_it = record.get("words") == self._words(job) and (self.root / job.name / job.last_file).is_file()
        if not is_it or ("inputs" in record and record["inputs"] != self._inputs(job)):
            return None
        return float(record["seconds"])

    def _inputs(self, job: Job) -> dict[str, str]:
        """What a job reads, by name → its state: other jobs' outputs, and what its flags name elsewhere."""
        flags = _values_of_flags(job.words)
        given = [Path(word) for flag in _INPUT_FLAGS for word in flags.get(flag, ()) if os.path.exists(word)]
        return {
            **{name: _state_of(self.root / name) for name in job.needs},
            **{str(path): _state_of(path) for path in given if not path.is_relative_to(self.root)},
            **({"--input": _state_of_text(flags)} if "--input" in flags else {}),
        }

    def recorded_seconds(self, job: Job) -> float:
        """That a job took when it was last completed; 0 where it never was."""
        return float(self._record_of(job.name).get("seconds", 0.0))

    def _record_of(self, name: str) -> Mapping[str, Any]:
        path = self._record_path(name)
        return read_json(path) if path.is_file() else {}

    def _record_path(self, name: str) -> Path:
        return self.root / "jobs" / f"{name.replace('/', '.')}.json"

    def _log_path(self, name: str) -> Path:
        return self.root / "logs" / f"{name.replace('/', '.')}.log"

    def _words(self, job: Job) -> list[str]:
        words = [*job.words, "--output", str(self.root / job.name)]
        if job.budget_of:
            seconds = [self._record_of(name).get("seconds", 0.0) for name in job.budget_of]
            words += ["--time-budget-seconds", f"{max(1.0, round(sum(seconds))):g}"]
        return words

    def _ready(self, waiting: Mapping[str, Job]) -> list[Job]:
        unfinished = {*waiting, *self._running}
        free = self.at_once - len(self._running)
        return [job for job in waiting.values() if not unfinished & {*job.needs}][: max(0, free)]

    def _start(self, job: Job, *, threads: int) -> None:
        for path in (self._record_path(job.name), self._log_path(job.name), self.root / job.name):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._inputs_at_start[job.name] = self._inputs(job)
        self._running[job.name] = self.launch(self._words(job), self._log_path(job.name), threads)

    def _ended(self) -> list[str]:
        return [name for name, child in self._running.items() if child.poll() is not None]

    def _finish(self, job: Job) -> float:
        code = self._running.pop(job.name).poll()
        log = self._log_path(job.name)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
            raise UserError(
                f"{job.words[0]} for {job.name} ended with exit code {code} ({last.strip()}): {log} has all"
                " that it said; mend that and run the same command again, it continues"
            )
        seconds = round(seconds_of_stage(self.root / job.name) or 0.0, 1)
        inputs = self._inputs_at_start[job.name]
        record = {"words": self._words(job), "inputs": inputs, "seconds": seconds}
        publish_json(self._record_path(job.name), record)
        return seconds

    def _time_left(self, jobs: Any) -> str:
        """In words; by what the preset says of each job, as if they filled all processes."""
        minutes = sum(job.expected_seconds for job in jobs) / self.at_once / 60
        return f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left"

    @contextlib.contextmanager
    def _children_ended(self) -> Iterator[None]:
        """No child stays when this is left."""
        try:
            yield
        finally:
            for child in self._running.values():
                child.terminate()
            for child in self._running.values():
                if not child.wait(_SECONDS_TO_END):
                    child.kill()
                    child.wait(_SECONDS_TO_END)
            self._running.clear()


def _values_of_flags(words: Sequence[str]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word
        else:
            values.setdefault(flag, []).append(word)
    return values


def _state_of_text(flags: Mapping[str, list[str]]) -> str:
    """What changes with the files that `prepare_corpus` would read; "" where it would refuse them."""
    try:
        found = find_files(flags["--input"], flags.get("--include"), flags.get("--exclude", ()))
    except UserError:
        return ""
    return content_hash([_size_and_time(file.path) for file in found.files])


def _state_of(path: Path) -> str:
    """What changes with the content: the SHA-256 of a file, or of the last one of a stage's output; of
    another directory that of its files' names, sizes and times; "" where there is nothing."""
    file = next((path / name for name in LAST_FILES if is_own_directory(path, name)), path)
    if file.is_file():
        return sha256_of_file(file)
    if not path.is_dir():
        return ""
    return content_hash([_size_and_time(file) for file in sorted(path.rglob("*")) if file.is_file()])


def _size_and_time(path: Path) -> tuple[str, int, int]:
    """With its name; zeros for what is no file here, or is gone by now."""
    try:
        state = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), state.st_size, state.st_mtime_ns


def cores_of_this_process() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def runner_of(root: Path, jobs: int | None) -> JobRunner:
    """A runner of so many jobs at once, at most one a core, which share the cores."""
    cores = cores_of_this_process()
    return JobRunner(root=root, at_once=min(jobs or cores, cores), cores=cores, launch=make_launcher())
