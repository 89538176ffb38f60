"""Part of `extract_keys`: its units, and what a position will take on disk, said before the run starts and
compared with the free space."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.files import require_free_bytes
from mlpmem_ds.core.temporaries import written_bytes
from mlpmem_ds.formats.keys import num_input_groups, unit_name

_logger = logging.getLogger(__name__)
LOG_PROBABILITY_BYTES = 4
UNIT_POSITIONS = 1 << 16
"""of a unit where no more units are needed than lie well in one folder"""
_MAX_UNIT_POSITIONS = 1 << 20
_MIN_UNITS = 1000


@dataclass(frozen=True, kw_only=True)
class PositionBytes:
    """Bytes of one position in a key directory."""

    key: int
    input: int
    value: int
    log_probability: int = LOG_PROBABILITY_BYTES

    @property
    def total(self) -> int:
        return self.key + self.input + self.value + self.log_probability


def auto_unit_positions(num_positions: int) -> int:
    """Positions of a unit without `--unit-positions`: a power of two.

    A unit is what a crash may cost, and each is four or five files; so there are many units, but not
    millions.
    """
    unit = UNIT_POSITIONS
    while unit < _MAX_UNIT_POSITIONS and num_positions >= 2 * unit * _MIN_UNITS:
        unit *= 2
    return unit


def blocks_of_units(num_positions: int, unit_positions: int) -> dict[str, Block]:
    """Unit → the rows that it makes, of `num_positions` that count; without the codec's."""
    return {unit_name(block.start): block for block in split_blocks(num_positions, unit_positions)}


def bytes_of_position(
    *, codec: str, dim: int, input_codec: str, input_size: int, value_bytes: int
) -> PositionBytes:
    """What the codecs make of a key of `dim` numbers and an input of `input_size`."""
    inputs = {"bf16": 2 * input_size, "int8": input_size + 4 * num_input_groups(input_size), "none": 0}
    return PositionBytes(
        key=dim * (1 if codec == "int8" else 2), input=inputs[input_codec], value=value_bytes
    )


def require_disk(
    output: Path, each: PositionBytes, num_positions: int, *, codec: str, input_codec: str
) -> None:
    """Say what the directory will take, and refuse to start where the disk cannot hold what is still missing.

    For one rank: it asks for the size of every file that is there.

    Raises:
        UserError: with both numbers.
    """
    total = each.total * num_positions
    existing = next(parent for parent in (output, *output.resolve().parents) if parent.exists())
    _logger.info(
        "%s positions at %d bytes: key %d (%s), input %d (%s), value %d, log-probability %d, list id 0 (the"
        " index holds it); %.3f GB in all, %.1f GB free",
        f"{num_positions:,}",
        each.total,
        each.key,
        codec,
        each.input,
        input_codec if each.input else "not stored: train online",
        each.value,
        each.log_probability,
        total / 1e9,
        shutil.disk_usage(existing).free / 1e9,
    )
    require_free_bytes(output, total - written_bytes(output, ".npy"), what="the keys")
