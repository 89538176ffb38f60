"""Part of `train`: batches of `--loader webdataset`, streamed shard by shard from wherever the shards are.

Whole shards are dealt to the ranks, and of a rank's to those that it has open at a time, each read to its end
by a thread of its own. A shard is a range of positions: their labels and inputs are read next to it, from
front to back. Blocks come from the open shards in turn; the rows of each are permuted, cut into groups of 64,
and the groups go through webdataset's shuffle buffer. So the order is another one than that of the default
loader, and it depends on the number of ranks. It ends where the training's last batch is filled: the number
of blocks to read follows from the manifest, and the last batches come from what is left in the buffer.

What was read is in the checkpoints (formats/shard_deal.py): a training goes on with the shards that were not
begun, and with the groups of those that were; of a group that lay across the end of the last batch the rows
come again, fewer than 64 a rank.

n rows of a group, I input size, V tokens.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count as count_from
from itertools import islice
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.ahead import run_ahead, timed
from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.hashing import hash_fraction, shuffled
from mlpmem_ds.core.objects.on_demand import ensure
from mlpmem_ds.core.world import World
from mlpmem_ds.engines import webdataset_stream
from mlpmem_ds.engines.processes import gather_values
from mlpmem_ds.formats.batches import InputReader
from mlpmem_ds.formats.shard_deal import (
    ROWS_OF_GROUP,
    Left,
    Report,
    ShardDeal,
    ShardSequence,
    blocks_to_read,
    groups_of_block,
    mask_of,
    num_groups,
    rows_left,
)
from mlpmem_ds.formats.target_encoding import TargetBlock, unpack_block
from mlpmem_ds.formats.target_shards import TargetShard, block_of_members, tar_stream
from mlpmem_ds.formats.targets import Targets
from mlpmem_ds.formats.training_rows import (
    MicroBatch,
    TrainingRows,
    finite_rows,
    micro_batches,
    stored_inputs,
)
from mlpmem_ds.formats.training_windows import StoredKeys

_BLOCKS_AHEAD, _BATCHES_AHEAD = 2, 2
_BATCHES_KEPT = 8  # whose positions may be asked for: those on their way to the device, and some more


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How shards are streamed.

    `place` of the target shards, as `webdataset_stream.url_of` takes it; `open_shards` that a rank reads at a
    time; `buffer_positions` of its shuffle buffer.
    """

    place: str
    open_shards: int
    buffer_positions: int
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Rows of one block: group `number` of the shard at `place` of the deal."""

    place: int
    number: int
    positions_n: np.ndarray
    inputs_nI: torch.Tensor
    rows: TrainingRows


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """A block as a thread has read it; `inputs_nI` None where they are computed afterwards."""

    place: int
    epoch: int
    first_group: int
    mask: int
    positions: Block
    inputs_nI: torch.Tensor | None
    rows: TrainingRows


class StreamedBatches:
    """This rank's rows of each step, as shards give them (`stages.training.parts.Batches`).

    Args:
        keys: values, log-probabilities, and inputs unless `inputs` computes them.
        targets: whose shards are streamed; of its files the manifest alone has to be here, and the order of
            the vocabulary where there is one.
        settings: how.
        batch_positions: of all ranks.
        world: this rank.
        num_micro_batches: into how many equal parts a rank's share is cut.
        with_log_probabilities: whether the base's log-probabilities go along.
        inputs: gives the inputs where the keys store none; not one that ranks call together.
    """

    may_run_ahead = True

    def __init__(
        self,
        keys: StoredKeys,
        targets: Targets,
        settings: StreamSettings,
        *,
        batch_positions: int,
        world: World,
        num_micro_batches: int,
        with_log_probabilities: bool,
        inputs: InputReader | None = None,
    ) -> None:
        assert inputs is None or not inputs.is_collective
        self._keys, self._targets, self._settings, self._inputs = keys, targets, settings, inputs
        self._share, self._world = batch_positions // world.size, world
        self._num_micro_batches, self._with_logs = num_micro_batches, with_log_probabilities
        self._sequence = ShardSequence(num_shards=len(targets.manifest.shards), seed=settings.seed)
        self._deal, self._next_place = ShardDeal(), world.rank
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()
        self._taken: dict[int, list[tuple[int, int]]] = {}
        self._recent: OrderedDict[int, tuple[np.ndarray, list[MicroBatch]]] = OrderedDict()

    # -- what a checkpoint keeps

    def continue_from(self, state: Mapping[str, Any] | None) -> None:
        """Go on with what a checkpoint says is left."""
        if state is not None:
            self._deal = ShardDeal.from_json(state)

    def state_after(self, step: int) -> dict[str, Any]:
        """What is left of the shards after so many steps; collective."""
        with self._lock:
            for number in sorted(number for number in self._taken if number < step):
                for place, group in self._taken.pop(number):
                    self._open[place] |= 1 << group
                    if self._open[place].bit_count() == self._num_groups(self._deal.at(place)):
                        del self._open[place]
            report = Report(next_place=self._next_place, open=dict(self._open))
        return self._deal.after(gather_values(report, self._world)).to_json()

    def _num_groups(self, left: Left) -> int:
        return num_groups(self._shard(left).count, self._targets.manifest.block_size)

    def _shard(self, left: Left) -> TargetShard:
        return self._targets.manifest.shards[self._sequence.at(left.number)[1]]

    def _note_open(self, place: int) -> None:
        """A thread begins the shard at a place: it, and those of this rank before it, are not read to their
        end."""
        with self._lock:
            while self._next_place <= place:
                self._open[self._next_place] = self._deal.at(self._next_place).mask
                self._next_place += self._world.size

    # -- the batches

    def stream(self, first: int, stop: int) -> Iterator[tuple[list[MicroBatch], float]]:
        """This rank's micro-batches of the steps [first, stop), and the seconds waited for each step's."""
        batches = run_ahead(self._batches(first, stop), count=_BATCHES_AHEAD, name="batches")
        with contextlib.closing(batches):  # type: ignore[type-var]
            yield from timed(batches)

    def faulty_positions(self, step: int) -> list[int]:
        """Those of this rank's positions in a recent step whose inputs or targets are not finite numbers."""
        positions_n, parts = self._recent[step]
        finite = torch.cat([finite_rows(part) for part in parts])
        return [int(position) for position in positions_n[~finite.numpy()]]

    def _batches(self, first: int, stop: int) -> Iterator[list[MicroBatch]]:
        seed = int(hash_fraction(f"{first}:{self._world.rank}", self._settings.seed) * 2**63)
        buffer = max(1, self._settings.buffer_positions // ROWS_OF_GROUP)
        rows = (stop - first) * self._share
        with contextlib.closing(self._groups(rows)) as merged:  # type: ignore[type-var]
            groups = webdataset_stream.shuffled(merged, buffer=buffer, seed=seed)
            cut: tuple[_Group, int] | None = None
            for batch in range(first, stop):
                parts: list[tuple[_Group, Block]] = []
                taken, missing = [], self._share
                while missing:
                    group, at = cut or (next(groups), 0)
                    end = min(len(group.positions_n), at + missing)
                    parts.append((group, Block(at, end)))
                    missing -= end - at
                    cut = (group, end) if end < len(group.positions_n) else None
                    if cut is None:
                        taken.append((group.place, group.number))
                yield self._joined(batch, parts, taken)

    def _joined(
        self, batch: int, parts: Sequence[tuple[_Group, Block]], taken: list[tuple[int, int]]
    ) -> list[MicroBatch]:
        rows = TrainingRows.join([group.rows.rows(*part) for group, part in parts])
        inputs_NI = torch.cat([group.inputs_nI[slice(*part)] for group, part in parts])
        found = micro_batches(inputs_NI, rows, self._num_micro_batches)
        positions_n = np.concatenate([group.positions_n[slice(*part)] for group, part in parts])
        with self._lock:
            self._taken[batch] = taken
        self._recent[batch] = positions_n, found
        while len(self._recent) > _BATCHES_KEPT:
            self._recent.popitem(last=False)
        return found

    # -- the shards

    def _groups(self, rows: int) -> Iterator[_Group]:
        """Groups of blocks of the open shards in turn, until they have so many rows."""
        readers_rows = [self._rows_of_shards(number) for number in range(self._settings.open_shards)]
        counts = blocks_to_read(readers_rows, rows)
        with contextlib.ExitStack() as stack:
            readers = [
                stack.enter_context(
                    contextlib.closing(  # type: ignore[type-var]
                        run_ahead(self._blocks(number, count), count=_BLOCKS_AHEAD, name=f"shards-{number}")
                    )
                )
                for number, count in enumerate(counts)
                if count
            ]
            while True:
                for reader in readers:
                    block = next(reader, None)
                    for group in self._groups_of(block) if block else ():
                        yield group
                        rows -= len(group.positions_n)
                        if rows <= 0:
                            return

    def _places(self, reader: int) -> Iterator[int]:
        """The places of the deal that one thread reads, one after another, without an end."""
        stride = self._settings.open_shards * self._world.size
        return count_from(self._world.rank + reader * self._world.size, stride)

    def _rows_of_shards(self, reader: int) -> Iterator[list[int]]:
        """Of each shard that one thread reads: the rows of its blocks that are left."""
        for place in self._places(reader):
            left = self._deal.at(place)
            yield rows_left(self._shard(left).count, self._targets.manifest.block_size, left.mask)

    def _blocks(self, reader: int, count: int) -> Iterator[_Block]:
        """So many blocks of the shards that one thread reads; none is opened for no block."""
        for place, rows in zip(self._places(reader), self._rows_of_shards(reader), strict=True):
            self._note_open(place)
            blocks = self._blocks_of(place, self._deal.at(place))
            # A shard that is needed whole is also read behind its last block, which checks it.
            yield from blocks if len(rows) <= count else islice(blocks, count)
            count -= len(rows)
            if count <= 0:
                return

    def _blocks_of(self, place: int, left: Left) -> Iterator[_Block]:
        epoch, number = self._sequence.at(left.number)
        shard, targets = self._targets.manifest.shards[number], self._targets
        record = targets.record(shard.name)
        if self._settings.place == str(targets.root):
            ensure(targets.root, record)
        source = webdataset_stream.Shard(
            url=webdataset_stream.url_of(self._settings.place, shard.name),
            num_bytes=record.bytes,
            sha256=record.sha256,
        )
        first, size = shard.first, targets.manifest.block_size
        for key, members in webdataset_stream.read_shard(
            source, unpack=partial(tar_stream, container=targets.container)
        ):
            block = self._unpacked(source.url, key, members, first, shard)
            first_group = (first - shard.first) // size * groups_of_block(size)
            groups = range(first_group, first_group + groups_of_block(block.count))
            first += block.count
            if mask_of(groups) & ~left.mask:
                yield self._read_block(source.url, block, place, epoch, first_group, left.mask)
        if first != shard.first + shard.count:
            raise DamagedDataError(f"{source.url} ends at position {first:,}: write the targets again")

    def _unpacked(
        self, url: str, key: str, members: Mapping[str, bytes], first: int, shard: TargetShard
    ) -> TargetBlock:
        try:
            block = block_of_members(members, self._targets.encoding)
        except Exception as error:  # zstandard's kinds, and those of NumPy and JSON
            raise DamagedDataError(f"{url}, sample {key} is damaged ({error})") from error
        size = min(self._targets.manifest.block_size, shard.first + shard.count - first)
        if (block.first, block.count) != (first, size):
            raise DamagedDataError(
                f"{url}, sample {key} holds {block.count} positions from {block.first:,} where {size} from"
                f" {first:,} come next: it is another file, write the targets again or mend the place"
            )
        return block

    def _read_block(
        self, url: str, block: TargetBlock, place: int, epoch: int, first_group: int, mask: int
    ) -> _Block:
        positions = Block(block.first, block.first + block.count)
        try:
            targets = unpack_block(block, self._targets.encoding, self._targets.order_V)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedDataError(f"{url}, block {block.first:,} is damaged ({error})") from error
        rows = TrainingRows(
            values_n=self._keys.read("values", *positions),
            log_probabilities_n=(
                self._keys.read("log_probabilities", *positions) if self._with_logs else None
            ),
            targets=targets.astype(np.int32, np.float32),
        )
        stored = None if self._inputs else stored_inputs(self._keys.read_inputs(*positions))
        return _Block(
            place=place,
            epoch=epoch,
            first_group=first_group,
            mask=mask,
            positions=positions,
            inputs_nI=stored,
            rows=rows,
        )

    def _groups_of(self, block: _Block) -> Iterator[_Group]:
        """Copies, so that a group in the shuffle buffer does not hold its whole block."""
        inputs_nI = block.inputs_nI
        if inputs_nI is None:
            assert self._inputs is not None
            inputs_nI = self._inputs([block.positions]).cpu()
        order = shuffled(block.positions.size, self._settings.seed, block.epoch, 1, block.positions.start)
        for number in range(groups_of_block(block.positions.size)):
            if block.mask >> block.first_group + number & 1:
                continue
            rows_n = order[number * ROWS_OF_GROUP : (number + 1) * ROWS_OF_GROUP]
            yield _Group(
                place=block.place,
                number=block.first_group + number,
                positions_n=block.positions.start + rows_n,
                inputs_nI=inputs_nI[torch.from_numpy(rows_n)],
                rows=TrainingRows.gather([block.rows], np.zeros(len(rows_n), np.int64), rows_n),
            )
