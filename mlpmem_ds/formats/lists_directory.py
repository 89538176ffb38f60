"""Keys in the order of an index's lists, mapped: what list search reads while targets are written. README.md
specifies it.

A run of positions is one file, so that a process opens no more files than there are runs, and a group of
lists side by side is one piece of each.

Shape legend: N positions of a run, L lists, V token ids, D numbers in a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlpmem_ds.core.array_files import read_array
from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.folders import folder_of
from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.maths.listed_keys import ListedKeys, ListedRun, run_of

FOLDER = "lists"
"""in a target directory, while the targets are being written"""
RUN_POSITIONS = 1 << 24
"""of a run. A list has one slice in each run: with a billion positions in 262,144 lists a slice is 64 keys,
long enough to be read from the disk at full speed"""
SIZES_NAME = "sizes.npy"
"""keys in each list, int64 [L]"""
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class ListsManifest(Manifest):
    """Keys in the order of an index's lists."""

    FORMAT: ClassVar[str] = "lists"
    VERSION: ClassVar[int] = 2

    num_positions: int


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """The arrays of a run's file: how many lists and token ids there are, and what keys and values are."""

    num_lists: int
    vocab_size: int
    dim: int
    key_dtype: np.dtype[Any]
    value_dtype: np.dtype[Any]

    def arrays(self, num_positions: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Name → dtype and shape, in the order of the file; norms of int8 codes only."""
        arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "offsets": (np.dtype(np.int64), (self.num_lists + 1,)),
            "counts": (np.dtype(np.int64), (self.vocab_size,)),
            "ids": (np.dtype(np.uint32), (num_positions,)),
            "norms": (np.dtype(np.int32), (num_positions,)),
            "values": (self.value_dtype, (num_positions,)),
            "keys": (self.key_dtype, (num_positions, self.dim)),
        }
        if self.key_dtype != np.int8:
            del arrays["norms"]
        return arrays

    def num_bytes(self, num_positions: int) -> int:
        """Of a run's file, but for its header."""
        return sum(_padded(_bytes_of(*array)) for array in self.arrays(num_positions).values())

    def views(self, file: np.ndarray, num_positions: int) -> Mapping[str, np.ndarray]:
        """The arrays over the bytes (uint8) of a run's file."""
        views, start = {}, 0
        for name, (dtype, shape) in self.arrays(num_positions).items():
            stop = start + _bytes_of(dtype, shape)
            views[name] = file[start:stop].view(dtype).reshape(shape)
            start += _padded(stop - start)
        return views

    def map_run(self, path: Path, num_positions: int) -> Mapping[str, np.ndarray]:
        """The arrays of a run's file, mapped."""
        # Slices of a memory map's own class cost five times as much as those of an array over it.
        return self.views(np.asarray(map_array(path)), num_positions)


@dataclass(frozen=True, kw_only=True)
class MappedLists:
    """A directory whose units are complete, all of it mapped: the keys list by list, the values by
    position."""

    keys: ListedKeys
    values: tuple[np.ndarray, ...]
    """of each run"""
    counts: tuple[np.ndarray, ...]
    """of each run: int64 [V], how often each token id is a value"""
    sizes_L: np.ndarray
    run_positions: int

    def values_of(self, positions: np.ndarray) -> np.ndarray:
        """The values of any positions (int64), in the shape of `positions`."""
        if len(self.values) == 1:
            return np.asarray(self.values[0][positions])
        flat_n = positions.ravel()
        runs_n = (flat_n // self.run_positions).astype(np.uint16 if len(self.values) < 1 << 16 else np.int64)
        order_n = np.argsort(runs_n, kind="stable")  # NumPy sorts 16-bit integers by their digits
        stops = np.searchsorted(runs_n[order_n], np.arange(len(self.values)), side="right")
        values_n = np.empty(len(flat_n), self.values[0].dtype)
        start = 0
        for run, stop in enumerate(stops.tolist()):
            rows = order_n[start:stop]
            values_n[rows] = self.values[run][flat_n[rows] - run * self.run_positions]
            start = stop
        return values_n.reshape(positions.shape)


def run_blocks(num_positions: int, run_positions: int) -> dict[str, Block]:
    """The positions of each run, by the name of the unit that makes it."""
    return {f"run-{block.start:012d}": block for block in split_blocks(num_positions, run_positions)}


def run_name(first: int, num_positions: int, run_positions: int) -> str:
    """The file of the run that starts at position `first`; above 1,000 runs they lie in folders."""
    num_runs = -(-num_positions // run_positions)
    return f"{folder_of(first // run_positions, num_runs)}run-{first:012d}.npy"


def number_name(shard: int) -> str:
    """The file with the list of each key of an index shard."""
    return f"numbers-{shard}.npy"


def open_key_lists(root: Path, num_positions: int, run_positions: int, layout: RunLayout) -> MappedLists:
    """A directory whose units are complete, all of it mapped: one file is opened for each run."""
    blocks = run_blocks(num_positions, run_positions).values()
    arrays = [
        layout.map_run(root / run_name(block.start, num_positions, run_positions), block.size)
        for block in blocks
    ]
    runs: list[ListedRun] = [
        run_of(block.start, run["offsets"], run["ids"], run["keys"], run.get("norms"))
        for block, run in zip(blocks, arrays, strict=True)
    ]
    return MappedLists(
        keys=ListedKeys(runs=runs, num_keys=num_positions),
        values=tuple(run["values"] for run in arrays),
        counts=tuple(run["counts"] for run in arrays),
        sizes_L=read_array(root / SIZES_NAME),
        run_positions=run_positions,
    )


def bytes_of_key_lists(num_positions: int, layout: RunLayout) -> int:
    """On disk: the runs, the list of each key, the sizes of the lists."""
    runs = sum(layout.num_bytes(block.size) for block in run_blocks(num_positions, RUN_POSITIONS).values())
    return runs + 4 * num_positions + 8 * layout.num_lists


def map_array(path: Path) -> Any:
    """An array of such a directory, mapped."""
    return read_array(path, mapped=True)


def _bytes_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    num_items = 1
    for size in shape:
        num_items *= size
    return num_items * dtype.itemsize


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
