"""Keys and index → the keys list by list, on disk: a stage directory of its own that write_targets makes
before it searches.

List search reads whole lists. In the order of positions a list's keys lie all over the datastore; in memory
they would be one copy a rank. Here they are written once, side by side, and all ranks of a machine read them
through the page cache; what does not fit in memory streams from the disk. Made again whenever it is missing;
a search does not depend on it.

Units: the list of every key as each index shard has it (`numbers-<shard>`), then runs of positions in the
order of their lists, and the values in one file. Shape legend: N keys of a shard or run, L lists.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

import numpy as np

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import read_json, require_free_bytes
from mlpmem_ds.core.manifest import format_of
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats import lists_directory as layout
from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.maths.distances import norms_of_codes
from mlpmem_ds.maths.listed_keys import ListedKeys
from mlpmem_ds.stages.retrieval.config import ListsConfig

_logger = logging.getLogger(__name__)
_VALUES = "values"
_ROWS = 1 << 16  # rows in memory while a run is written


def check_key_lists(root: Path, keys: Keys, index: IndexDirectory) -> None:
    """Refuse a directory of --lists that holds something else, and a disk that cannot hold it.

    Raises:
        UserError: with the remedy.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"--lists {root} is a file: choose a directory")
    identity = root / "identity.json"
    if identity.is_file():
        inputs = read_json(identity).get("inputs")
        if format_of(root) != layout.ListsManifest.FORMAT or inputs != _inputs(keys, index):
            raise UserError(
                f"--lists {root} holds something else than the keys of {keys.root} in the lists of"
                f" {index.root}: choose another directory, or remove it"
            )
    elif root.is_dir() and any(not path.name.startswith(".") for path in root.iterdir()):
        raise UserError(f"--lists {root} is not empty: choose a new directory or empty it")
    require_free_bytes(root, missing_bytes(root, keys, index), what="the keys in list order (--lists)")


def missing_bytes(root: Path, keys: Keys, index: IndexDirectory) -> int:
    """What making the lists will still take on disk."""
    total = layout.bytes_of_key_lists(
        keys.num_positions,
        index.num_lists,
        keys.dim * (1 if keys.codec == "int8" else 4 if keys.raw_dtype == "bfloat16" else 2),
        keys.unit("values", 0).itemsize,
        is_integer=keys.codec == "int8",
    )
    existing_bytes = sum(path.stat().st_size for path in root.glob("*.npy")) if root.is_dir() else 0
    return max(0, total - existing_bytes)


def make_key_lists(root: Path, keys: Keys, index: IndexDirectory, world: World) -> ListedKeys:
    """The keys list by list, mapped; made by all ranks that ask, each its share, where they are missing.

    Inputs are compared with their checksums by the unit that reads them, what is made by every rank before it
    is used.
    """
    config = ListsConfig(output=root, run_positions=layout.RUN_POSITIONS)
    stage = open_stage(
        root,
        stage=layout.ListsManifest.FORMAT,
        version=layout.ListsManifest.VERSION,
        config=config,
        inputs=_inputs(keys, index),
        world=world,
    )
    numbers = {f"numbers-{shard}": shard for shard in range(len(index.shard_paths))}
    runs = layout.run_blocks(keys.num_positions, config.run_positions)
    if not stage.manifest_path.is_file():
        _logger.info(
            "bringing %s keys in the order of %d lists: %.2f GB on disk while targets are written",
            f"{keys.num_positions:,}",
            index.num_lists,
            missing_bytes(root, keys, index) / 1e9,
        )
    stage.run_phase(list(numbers), lambda unit, writer: _write_numbers(keys, index, numbers[unit], writer))
    stage.run_phase(
        [*runs, _VALUES], lambda unit, writer: _write_run(root, keys, index, runs.get(unit), writer)
    )
    stage.complete([*numbers, *runs, _VALUES], lambda: layout.ListsManifest(num_positions=keys.num_positions))
    return layout.open_key_lists(root, keys.num_positions, config.run_positions)


def remove_key_lists(root: Path) -> None:
    """Remove a directory of lists, first its name: one that is there is never half gone. Who has it mapped
    may go on."""
    former = root.with_name(f".{root.name}.removed")
    shutil.rmtree(former, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not there, or another rank is at it
        os.replace(root, former)
    shutil.rmtree(former, ignore_errors=True)


def _inputs(keys: Keys, index: IndexDirectory) -> dict[str, str]:
    return {"keys": keys.sha256, "index": index.sha256}


def _write_numbers(keys: Keys, index: IndexDirectory, shard: int, writer: UnitWriter) -> None:
    """The list of each key of a shard, in the order of positions: int32."""
    from mlpmem_ds.stages.retrieval.shard_lists import map_lists

    index.check(index.shard_paths[shard].name)
    mapped = map_lists(index, shard)
    numbers_N = np.full(_rows_of_shard(keys, index, shard), -1, np.int32)
    for number in np.flatnonzero(mapped.list_sizes()).tolist():
        ids = mapped.ids_of_list(number)
        in_shard, rows = _place(keys, index, ids)
        if ids.min() < 0 or ids.max() >= keys.num_positions or (in_shard != shard).any():
            raise _damaged(index, shard)
        numbers_N[rows] = number
    if (numbers_N < 0).any():
        raise _damaged(index, shard)
    writer.array(layout.number_name(shard), numbers_N)


def _damaged(index: IndexDirectory, shard: int) -> DamagedDataError:
    return DamagedDataError(
        f"{index.shard_paths[shard]} does not hold the keys that are its share: build the index again"
    )


def _place(keys: Keys, index: IndexDirectory, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(shard, row among the shard's keys) of positions: key units are dealt to the shards in turn."""
    unit_size, num_shards = keys.manifest.unit_positions, len(index.shard_paths)
    units = positions // unit_size
    return units % num_shards, units // num_shards * unit_size + positions % unit_size


def _rows_of_shard(keys: Keys, index: IndexDirectory, shard: int) -> int:
    return sum(block.size for block in keys.blocks[shard :: len(index.shard_paths)])


def _write_run(root: Path, keys: Keys, index: IndexDirectory, run: Block | None, writer: UnitWriter) -> None:
    """Keys, ids and norms of a run of positions in the order of their lists; without a run, the values of all
    positions."""
    if run is None:
        keys.check("values")
        with writer.file(layout.VALUES_NAME) as path:
            values = np.lib.format.open_memmap(
                path, mode="w+", dtype=keys.unit("values", 0).dtype, shape=(keys.num_positions,)
            )
            for block in keys.blocks:
                values[slice(*block)] = keys.unit("values", block.start)
            values.flush()
        return
    for block in keys.blocks:
        if block.start < run.stop and run.start < block.stop:
            keys.check("keys", block)
    numbers_N = _numbers_of_run(root, keys, index, run)
    order_N = np.argsort(numbers_N, kind="stable")
    offsets_L1 = np.zeros(index.num_lists + 1, np.int64)
    np.cumsum(np.bincount(numbers_N, minlength=index.num_lists), out=offsets_L1[1:])
    writer.array(layout.array_name("offsets", run.start), offsets_L1)
    writer.array(layout.array_name("ids", run.start), order_N.astype(np.uint32))
    row = keys.read("keys", 0, 1)
    with writer.file(layout.array_name("keys", run.start)) as path:
        listed = np.lib.format.open_memmap(path, mode="w+", dtype=row.dtype, shape=(run.size, row.shape[1]))
        for rows in split_blocks(run.size, _ROWS):
            listed[slice(*rows)] = keys.gather("keys", run.start + order_N[slice(*rows)])
        listed.flush()
        norms_N = norms_of_codes(listed) if listed.dtype == np.int8 else None
    if norms_N is not None:
        writer.array(layout.array_name("norms", run.start), norms_N)


def _numbers_of_run(root: Path, keys: Keys, index: IndexDirectory, run: Block) -> np.ndarray:
    """The list of each position of a run, int32, from the shards' files."""
    files = [
        np.load(root / layout.number_name(shard), mmap_mode="r", allow_pickle=False)
        for shard in range(len(index.shard_paths))
    ]
    numbers_N = np.empty(run.size, np.int32)
    unit_size = keys.manifest.unit_positions
    start = run.start
    while start < run.stop:
        stop = min(run.stop, (start // unit_size + 1) * unit_size)
        shard, row = (int(place) for place in _place(keys, index, np.int64(start)))
        numbers_N[start - run.start : stop - run.start] = files[shard][row : row + stop - start]
        start = stop
    return numbers_N
