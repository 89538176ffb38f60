"""Part of `inspect_run`: `--watch` and `--prometheus`, looks at a run that goes on meanwhile.

Nothing is written but the file that was asked for, and no file of a unit is opened. The run directory is
listed in every round, the logs of the stages that are not complete are opened; once a minute all stages are
looked for again, and the logs of further hosts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_bytes
from mlpmem_ds.formats.lists_directory import FOLDER as LISTS
from mlpmem_ds.stages.inspection.progress import StageProgress, StageWatch
from mlpmem_ds.stages.inspection.prometheus import exposition
from mlpmem_ds.stages.inspection.screen import open_screen

_SECONDS_BETWEEN_DISCOVERIES = 60.0
_MAX_DEPTH = 3
_INSIDE_STAGES = (LISTS, "audit")
"""folders of a stage in which another one may lie"""


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """A run directory at one moment."""

    run: Path
    time: float
    stages: tuple[StageProgress, ...]
    """in the order in which they were first started"""
    disk_bytes: int
    free_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of the files of all units."""
        return sum(stage.num_bytes for stage in self.stages)


class RunWatch:
    """Follows a run directory, or one stage's."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._watches: dict[Path, StageWatch] = {}
        self._last: dict[Path, StageProgress] = {}
        self._names: frozenset[str] = frozenset()
        self._discovered = float("-inf")

    def look(self) -> RunProgress:
        """One round."""
        self._discover()
        for root, watch in self._watches.items():
            if not (watch.is_idle and root in self._last):
                self._last[root] = watch.look()
        disk = shutil.disk_usage(self._run)
        stages = sorted(
            self._last.values(), key=lambda stage: (stage.started or float("inf"), str(stage.root))
        )
        return RunProgress(
            run=self._run,
            time=time.time(),
            stages=tuple(stages),
            disk_bytes=disk.total,
            free_bytes=disk.free,
        )

    def _discover(self) -> None:
        """Look for stages and logs where a minute has passed, or the run directory has other names."""
        names = frozenset(os.listdir(self._run))
        now = time.monotonic()
        if names == self._names and now - self._discovered < _SECONDS_BETWEEN_DISCOVERIES:
            return
        self._names, self._discovered = names, now
        roots = sorted(stage_roots(self._run))
        self._watches = {
            root: self._watches.get(root) or StageWatch(root, name_of(self._run, root)) for root in roots
        }
        self._last = {}
        for watch in self._watches.values():
            watch.open_logs()


def stage_roots(folder: Path, depth: int = _MAX_DEPTH) -> Iterator[Path]:
    """The stage directories at or below `folder`; of a stage itself only the folders that may hold another
    are looked at."""
    with contextlib.suppress(OSError):
        with os.scandir(folder) as entries:
            folders, files = [], set()
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.name)
                else:
                    files.add(entry.name)
        is_stage = "identity.json" in files
        if is_stage:
            yield folder
        for name in folders:
            if depth and not name.startswith(".") and (not is_stage or name in _INSIDE_STAGES):
                yield from stage_roots(folder / name, depth - 1)


def name_of(run: Path, root: Path) -> str:
    """A directory's path below the run directory."""
    return run.resolve().name if root == run else root.relative_to(run).as_posix()


def watch_run(run: Path, *, seconds: float | None, prometheus: Path | None) -> None:
    """Show a run until Ctrl-C, and write its figures for Prometheus.

    Args:
        run: a run directory, or one stage's.
        seconds: between two rounds; None: look once and show nothing.
        prometheus: the file to write in each round, if any.

    Raises:
        UserError: `prometheus` is no name that node-exporter reads, or `run` is no run directory.
    """
    if prometheus is not None and prometheus.suffix != ".prom":
        raise UserError(f"--prometheus {prometheus}: node-exporter's text collector reads *.prom alone")
    watch = RunWatch(run)
    if not watch.look().stages:
        raise UserError(
            f"{run} holds no stage of this project (no identity.json below it): give a run directory, of"
            " which one stage has begun"
        )
    if seconds is None:
        _write(watch.look(), prometheus)
        return
    with contextlib.suppress(KeyboardInterrupt), open_screen() as show:
        while True:
            progress = watch.look()
            _write(progress, prometheus)
            show(progress.stages, progress.run, progress.free_bytes)
            time.sleep(seconds)


def _write(progress: RunProgress, path: Path | None) -> None:
    if path is not None:
        text = exposition(
            progress.stages,
            run=progress.run.resolve().name,
            disk_bytes=progress.disk_bytes,
            free_bytes=progress.free_bytes,
            time=progress.time,
        )
        publish_bytes(path, text.encode())
