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
    """Copies one checkpoint at a time in a thread; a new one waits for the one before.

    Args:
        root: where the copies go.
        keep: newest copies kept.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep
        self._thread: threading.Thread | None = None

    def start(self, checkpoint: Path) -> None:
        """Begin to copy; the checkpoint must stay until `wait` (or the next `start`) returns."""
        self.wait()
        self._thread = threading.Thread(
            target=self._copy, args=(checkpoint,), name="checkpoint copy", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the copy that was begun is whole, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, checkpoint: Path) -> None:
        try:
            copy_checkpoint(checkpoint, self._root)
            remove_old_checkpoints(self._root, self._keep)
        except (OSError, DamagedDataError) as error:
            _logger.warning(
                "%s was not copied to --copy-to %s (%s); training goes on", checkpoint, self._root, error
            )
