"""Keys and index → the keys list by list, on disk: a stage directory of its own that write_targets makes
before it searches.

List search reads whole lists. In the order of positions a list's keys lie all over the datastore; in memory
they would be one copy a rank. Here they are written once, side by side, and all ranks of a machine read them
through the page cache; what does not fit in memory streams from the disk. Made again whenever it is missing;
a search does not depend on it.

Units: the list of every key as each index shard has it (`numbers-<shard>`), then runs of positions in the
order of their lists with the values of these positions, and the sizes of the lists. Each file of keys, values
and index is compared with its checksum once, by the rank that reads it for its unit; the unit's record says
so, and no other rank reads it for that. Shape legend: N keys of a shard or run, L lists, V token ids.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.claims import ClaimWatch, State, claim
from mlpmem_ds.core.dealing import Dealer
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import read_json_object, require_free_bytes
from mlpmem_ds.core.host import this_process
from mlpmem_ds.core.manifest import format_of
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.temporaries import written_bytes
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats import lists_directory as layout
from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.maths.distances import norms_of_codes
from mlpmem_ds.stages.retrieval.config import ListsConfig

_logger = logging.getLogger(__name__)
_SIZES = "sizes"
_ROWS = 1 << 16  # rows in memory while a run is written
_NUMBERS_AT_ONCE = 1 << 22  # that are counted
_SECONDS_BETWEEN_LOOKS = 0.5


def check_key_lists(root: Path, keys: Keys, index: IndexDirectory) -> None:
    """Refuse a directory of --lists that holds something else, and a disk that cannot hold it.

    Raises:
        UserError: with the remedy.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"--lists {root} is a file: choose a directory")
    identity = root / "identity.json"
    if identity.is_file():
        inputs = read_json_object(identity).get("inputs")
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
    total = layout.bytes_of_key_lists(keys.num_positions, layout_of(keys, index))
    return max(0, total - written_bytes(root, ".npy"))


def layout_of(keys: Keys, index: IndexDirectory) -> layout.RunLayout:
    """What a run of these keys in these lists holds; bfloat16 keys lie there as float32."""
    raw_dtype = np.float32 if keys.raw_dtype == "bfloat16" else np.float16
    return layout.RunLayout(
        num_lists=index.num_lists,
        vocab_size=keys.manifest.vocab_size,
        dim=keys.dim,
        key_dtype=np.dtype(np.int8 if keys.codec == "int8" else raw_dtype),
        value_dtype=keys.unit("values", 0).dtype,
    )


def make_key_lists(
    root: Path, keys: Keys, index: IndexDirectory, world: World, dealer: Dealer | None = None
) -> layout.MappedLists:
    """The keys list by list, mapped; made by all ranks that ask, each its share, where they are missing."""
    config = ListsConfig(output=root, run_positions=layout.RUN_POSITIONS)
    stage = open_stage(
        root,
        stage=layout.ListsManifest.FORMAT,
        version=layout.ListsManifest.VERSION,
        config=config,
        inputs=_inputs(keys, index),
        world=world,
        dealer=dealer,
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
    source = _Source(root=root, keys=keys, index=index, layout=layout_of(keys, index))
    stage.run_phase(list(numbers), lambda unit, writer: source.write_numbers(numbers[unit], writer))

    def write(unit: str, writer: UnitWriter) -> None:
        if unit == _SIZES:
            source.write_sizes(writer)
        else:
            source.write_run(runs[unit], writer)

    stage.run_phase([*runs, _SIZES], write)
    units = [*numbers, *runs, _SIZES]
    stage.complete(units, lambda: layout.ListsManifest(num_positions=keys.num_positions))
    return layout.open_key_lists(root, keys.num_positions, config.run_positions, source.layout)


class ListsInUse:
    """The processes that may read the lists below an output, so that the last of them removes the lists.

    On NFS a mapped file that a rank of another host removes is gone (SIGBUS): only there the last reader must
    not be another's. A process takes its claim before it looks at what is missing; so whoever finds no claim
    and complete targets knows that no process will still need the lists. The claim of a process of another
    host that was killed counts for a minute of this process's own time, which the end of a shorter run waits
    for: targets that are complete are not started again.
    """

    def __init__(self, output: Path) -> None:
        self._output, self._watch = output, ClaimWatch()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Be one of them while the block runs."""
        self._others()  # a first look, for one a minute later
        with claim(self._output / f".lists-{this_process().name}.claim"):
            yield

    def remove_unless_held(self) -> None:
        """Remove the lists if no other process reads them. Called after `hold`."""
        while (others := self._others()) and "held" not in others:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if not others:
            remove_key_lists(self._output / layout.FOLDER)

    def _others(self) -> list[State]:
        """What is known of each other process; the claims of those that are gone are removed."""
        states = {path: self._watch.look(path) for path in self._output.glob(".lists-*.claim")}
        for path, state in states.items():
            if state == "gone":
                path.unlink(missing_ok=True)
        return [state for state in states.values() if state != "gone"]


def remove_key_lists(root: Path) -> None:
    """Remove a directory of lists, first its name: one that is there is never half gone."""
    former = root.with_name(f".{root.name}.removed")
    shutil.rmtree(former, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not there, or another rank is at it
        os.replace(root, former)
    shutil.rmtree(former, ignore_errors=True)


def _inputs(keys: Keys, index: IndexDirectory) -> dict[str, str]:
    return {"keys": keys.sha256, "index": index.sha256}


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What the units of a directory of lists are made from."""

    root: Path
    keys: Keys
    index: IndexDirectory
    layout: layout.RunLayout

    def write_numbers(self, shard: int, writer: UnitWriter) -> None:
        """The list of each key of a shard, in the order of positions: int32."""
        from mlpmem_ds.stages.retrieval.shard_lists import map_lists

        index = self.index
        index.check(index.shard_paths[shard].name)
        mapped = map_lists(index, shard)
        numbers_N = np.full(self._rows_of_shard(shard), -1, np.int32)
        for number in np.flatnonzero(mapped.list_sizes()).tolist():
            ids = mapped.ids_of_list(number)
            in_shard, rows = self._place(ids)
            if ids.min() < 0 or ids.max() >= self.keys.num_positions or (in_shard != shard).any():
                raise _damaged(index, shard)
            numbers_N[rows] = number
        if (numbers_N < 0).any():
            raise _damaged(index, shard)
        writer.array(layout.number_name(shard), numbers_N)

    def write_sizes(self, writer: UnitWriter) -> None:
        """The number of keys in each list, of all shards: int64."""
        sizes_L = np.zeros(self.index.num_lists, np.int64)
        for numbers_N in self._numbers:
            for rows in split_blocks(len(numbers_N), _NUMBERS_AT_ONCE):
                sizes_L += np.bincount(numbers_N[slice(*rows)], minlength=len(sizes_L))
        writer.array(layout.SIZES_NAME, sizes_L)

    def write_run(self, run: Block, writer: UnitWriter) -> None:
        """Keys, ids, norms and list offsets of a run of positions in the order of their lists, and its
        values in the order of positions."""
        keys = self.keys
        for block in keys.blocks:
            if block.start < run.stop and run.start < block.stop:
                keys.check("keys", block)
                keys.check("values", block)
        numbers_N = self._numbers_of_run(run)
        order_N = np.argsort(numbers_N, kind="stable")
        with writer.file(layout.run_name(run.start, keys.num_positions, layout.RUN_POSITIONS)) as path:
            size = (self.layout.num_bytes(run.size),)
            file = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=size)
            arrays = self.layout.views(file, run.size)
            arrays["offsets"][0] = 0
            np.cumsum(np.bincount(numbers_N, minlength=self.layout.num_lists), out=arrays["offsets"][1:])
            arrays["ids"][:] = order_N
            values_N = keys.read("values", *run)
            arrays["values"][:] = values_N
            arrays["counts"][:] = np.bincount(values_N, minlength=self.layout.vocab_size)
            for rows in split_blocks(run.size, _ROWS):
                chosen = run.start + order_N[slice(*rows)]
                arrays["keys"][slice(*rows)] = keys.gather("keys", chosen)
            if "norms" in arrays:
                arrays["norms"][:] = norms_of_codes(np.asarray(arrays["keys"]))
            file.flush()

    @cached_property
    def _numbers(self) -> list[np.ndarray]:
        """The list of each key of each shard, mapped."""
        names = [layout.number_name(shard) for shard in range(len(self.index.shard_paths))]
        return [np.asarray(layout.map_array(self.root / name)) for name in names]

    def _numbers_of_run(self, run: Block) -> np.ndarray:
        """The list of each position of a run, int32, from the shards' files."""
        numbers_N = np.empty(run.size, np.int32)
        unit_size = self.keys.manifest.unit_positions
        start = run.start
        while start < run.stop:
            stop = min(run.stop, (start // unit_size + 1) * unit_size)
            shard, row = (int(place) for place in self._place(np.int64(start)))
            numbers_N[start - run.start : stop - run.start] = self._numbers[shard][row : row + stop - start]
            start = stop
        return numbers_N

    def _place(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row among the shard's keys) of positions: key units are dealt to the shards in turn."""
        unit_size, num_shards = self.keys.manifest.unit_positions, len(self.index.shard_paths)
        units = positions // unit_size
        return units % num_shards, units // num_shards * unit_size + positions % unit_size

    def _rows_of_shard(self, shard: int) -> int:
        return sum(block.size for block in self.keys.blocks[shard :: len(self.index.shard_paths)])


def _damaged(index: IndexDirectory, shard: int) -> DamagedDataError:
    return DamagedDataError(
        f"{index.shard_paths[shard]} does not hold the keys that are its share: build the index again"
    )
