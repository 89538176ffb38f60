"""Keys in the order of an index's lists, mapped: what list search reads while targets are written. README.md
specifies it.

Shape legend: N positions, L lists, R positions of a run, D numbers in a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.maths.listed_keys import ListedKeys, ListedRun, run_of

FOLDER = "lists"
"""in a target directory, while the targets are being written"""
RUN_POSITIONS = 1 << 24
"""of a run. A list has one slice in each run: with a billion positions in 262,144 lists a slice is 64 keys,
long enough to be read from the disk at full speed"""
VALUES_NAME = "values.npy"
"""the value of each position"""


@dataclass(frozen=True, kw_only=True)
class ListsManifest(Manifest):
    """Keys in the order of an index's lists."""

    FORMAT: ClassVar[str] = "lists"
    VERSION: ClassVar[int] = 1

    num_positions: int


def run_blocks(num_positions: int, run_positions: int) -> dict[str, Block]:
    """The positions of each run, by the name of the unit that makes it."""
    return {f"run-{block.start:012d}": block for block in split_blocks(num_positions, run_positions)}


def number_name(shard: int) -> str:
    """The file with the list of each key of an index shard."""
    return f"numbers-{shard}.npy"


def array_name(array: str, first: int) -> str:
    """`keys`, `ids`, `offsets` or `norms` of the run that starts at position `first`."""
    return f"{array}-{first:012d}.npy"


def open_key_lists(root: Path, num_positions: int, run_positions: int) -> ListedKeys:
    """The keys list by list of a directory whose units are complete, all of it mapped."""

    def run(first: int) -> ListedRun:
        norms = root / array_name("norms", first)
        return run_of(
            first,
            map_array(root / array_name("offsets", first)),
            map_array(root / array_name("ids", first)),
            map_array(root / array_name("keys", first)),
            map_array(norms) if norms.is_file() else None,
        )

    runs = [run(block.start) for block in run_blocks(num_positions, run_positions).values()]
    return ListedKeys(runs=runs, num_keys=num_positions)


def bytes_of_key_lists(
    num_positions: int, num_lists: int, key_bytes: int, value_bytes: int, *, is_integer: bool
) -> int:
    """On disk: key, its list, id, value and (of int8 codes) norm; and the offsets of each run."""
    num_runs = -(-num_positions // RUN_POSITIONS)
    each = key_bytes + 4 + 4 + value_bytes + (4 if is_integer else 0)
    return num_positions * each + num_runs * 8 * (num_lists + 1)


def map_array(path: Path) -> Any:
    """An array of such a directory, mapped."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
