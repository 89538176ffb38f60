"""The files that a stage reads, compared with their checksums once, by one of its ranks, which is noted.

A flipped byte in a key would be a wrong neighbour in silence. No rank reads all files to make sure: groups of
them are units of the stage that reads them, without files of their own, dealt among the ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.files import FileRecord, size_in_words
from mlpmem_ds.core.manifest import CompleteStage
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.core.unit_writer import UnitWriter

_logger = logging.getLogger(__name__)
_MIN_FILES = 16  # of a unit
_MAX_UNITS = 512


def num_records(num_files: int) -> int:
    """The units, each a record, in which so many files are compared."""
    return -(-num_files // _files_of_unit(num_files))


def _files_of_unit(num_files: int) -> int:
    return max(_MIN_FILES, -(-num_files // _MAX_UNITS))


def verify_inputs(
    directory: StageDirectory, source: CompleteStage[Any], names: Sequence[str], *, label: str
) -> None:
    """Return when all these files of an input have been compared with their checksums, by any ranks.

    What was compared in an earlier start of the same directory is not compared again.

    Args:
        directory: of the stage that reads them; the notes are its units `verified-<label>-<number>`.
        source: the input.
        names: of its files, in the same order on every rank.
        label: of this input among those of the stage.

    Raises:
        DamagedDataError: on the rank that finds a file with another checksum.
    """
    size = _files_of_unit(len(names))
    blocks = {
        f"verified-{label}-{number:03d}": block for number, block in enumerate(split_blocks(len(names), size))
    }

    compared: list[FileRecord] = []
    start = time.monotonic()

    def verify(unit: str, writer: UnitWriter) -> dict[str, Any]:
        records = [source.record(name) for name in names[slice(*blocks[unit])]]
        source.check_files(record.name for record in records)
        compared.extend(records)
        return {"files": len(records), "bytes": sum(record.bytes for record in records)}

    directory.run_units(list(blocks), verify)
    seconds = time.monotonic() - start
    directory.wait_for(list(blocks))
    if compared:
        _logger.info(
            "%s: %d of %d files compared with their checksums, %s in %.1f s",
            source.root, len(compared), len(names),
            size_in_words(sum(record.bytes for record in compared)), seconds,
        )  # fmt: skip
