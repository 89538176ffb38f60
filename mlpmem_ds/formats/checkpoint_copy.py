"""A second place for checkpoints: copied in the background, verified, published like the first. Rank 0 does
it.

Place in the pipeline: under `train`, for the day when OUTPUT's disk is lost. A copy that fails costs a
warning, never the training.
"""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

from mlpmem_ds.core.directories import publish_directory
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import fault_of_file, flush
from mlpmem_ds.formats.checkpoint import read_checkpoint, remove_old_checkpoints, remove_unfinished

_logger = logging.getLogger(__name__)


def copy_checkpoint(source: Path, root: Path) -> Path:
    """Copy a published checkpoint below `root`; it appears there whole, its files checked against the
    manifest.

    Raises:
        DamagedDataError: the copy does not match the manifest.
        OSError: it cannot be read or written.
    """
    root.mkdir(parents=True, exist_ok=True)
    remove_unfinished(root)
    final = root / source.name
    with publish_directory(final, temporary=root / f"{source.name}.tmp") as temporary:
        for record in read_checkpoint(source).manifest.files:
            place = temporary / record.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / record.name, place)
            flush(place)
            if fault := fault_of_file(temporary, record):
                raise DamagedDataError(f"copied wrongly: {fault}")
        shutil.copyfile(source / "manifest.json", temporary / "manifest.json")
    return final


class CheckpointCopier:
    """Copies checkpoints in a thread, one at a time; no step waits for a slow target.

    Those that are published meanwhile wait for their turn, at most `keep` of them: an older one is not
    copied.

    Args:
        root: where the copies go.
        keep: newest checkpoints kept, at their first place and there.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep
        self._lock = threading.Lock()
        self._in_work: Path | None = None
        self._waiting: list[Path] = []
        self._thread: threading.Thread | None = None

    def start(self, checkpoint: Path) -> list[Path]:
        """Copy a checkpoint as soon as those before it are whole.

        Returns the older checkpoints that must stay until the next call: the one in work.
        """
        with self._lock:
            self._waiting.append(checkpoint)
            for late in self._waiting[: -self._keep]:
                _logger.warning(
                    "%s is not copied: copies to --copy-to %s take longer than the steps between checkpoints",
                    late,
                    self._root,
                )
            self._waiting = self._waiting[-self._keep :]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint copy", daemon=True)
                self._thread.start()
            return [] if self._in_work is None else [self._in_work]

    def wait(self) -> None:
        """Until all that was begun is whole, or has failed."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._in_work = self._waiting.pop(0) if self._waiting else None
                if self._in_work is None:
                    self._thread = None
                    return
            self._copy(self._in_work)

    def _copy(self, checkpoint: Path) -> None:
        try:
            copy_checkpoint(checkpoint, self._root)
            remove_old_checkpoints(self._root, self._keep)
        except (OSError, DamagedDataError) as error:
            _logger.warning(
                "%s was not copied to --copy-to %s (%s); training goes on", checkpoint, self._root, error
            )
