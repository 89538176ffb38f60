"""Part of `extract_keys`: the rows of a unit, batch by batch, and those of the next unit begun early.

On a GPU the next unit's first batches are queued while the files of this one are finished, so that the device
does not wait for the disk. Nothing of that unit is written before it is this rank's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.engines.hidden_states import is_read_ahead, scan_positions
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.counted_rows import CountedRows
from mlpmem_ds.formats.keys import Codec
from mlpmem_ds.stages.keys.config import Config
from mlpmem_ds.stages.keys.inputs import Bases
from mlpmem_ds.stages.keys.rows import RowMaker, stored_rows


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a batch of windows gives: checked rows of the arrays, as they are stored."""

    block: Block
    """the positions that were read, not all of which need to have a row"""
    arrays: dict[str, np.ndarray]
    num_clipped: int
    seconds: float
    """that the forward passes took, reading the tokens and the head's product included"""

    @property
    def num_rows(self) -> int:
        return len(self.arrays["values"])


def read_block(
    config: Config, corpus: CorpusSplit, bases: Bases, codec: Codec, block: Block
) -> Iterator[Rows]:
    """The rows [start, stop), batch by batch; where there are two models, each reads a batch of windows, one
    after the other."""
    counted = CountedRows(corpus)
    key, own = {"key": bases.key_point}, {"input": bases.input_point}
    own = own if config.input_codec != "none" else {}
    points = key | own
    read = partial(
        scan_positions,
        corpus=corpus,
        block=counted.span(block),
        chosen=counted.offsets,
        batch_windows=config.batch_windows,
        finish=RowMaker(codec=codec, input_codec=config.input_codec),
    )
    readings = [read(bases.input_source, points=points if bases.is_one else own)]
    if not bases.is_one:
        readings.append(read(bases.key_source, points=key, with_log_probabilities=False))
    while True:
        start = perf_counter()
        batch = [rows for reading in readings if (rows := next(reading, None)) is not None]
        seconds = perf_counter() - start
        if not batch:
            return
        block_n, offsets_n = batch[0].block, counted.offsets(batch[0].block)
        positions_n = np.arange(*block_n) if offsets_n is None else block_n.start + offsets_n
        made = {name: array for each in batch for name, array in each.states.items()}
        values_n = corpus.values(*block_n).astype(corpus.dtype)
        arrays = {"values": values_n if offsets_n is None else values_n[offsets_n]}
        arrays["log_probabilities"] = batch[0].log_probabilities
        arrays |= stored_rows(made, arrays["log_probabilities"], positions_n, points)
        if offsets_n is not None:
            arrays["positions"] = positions_n
        yield Rows(block=block_n, arrays=arrays, num_clipped=int(made.get("clipped", 0)), seconds=seconds)


def are_read_ahead(bases: Bases) -> bool:
    """Whether reading one unit early costs nothing: the host is free while the device works."""
    return is_read_ahead(bases.input_source) and is_read_ahead(bases.key_source)


@dataclass(frozen=True, kw_only=True)
class _Begun:
    block: Block
    rows: Iterator[Rows]
    first: Future[Rows | None]


class UnitReader:
    """Reads the rows of one block after another; a context, which a block that was begun needs to end.

    Args:
        read: a block's rows.
        ahead: whether `begin` does anything.
    """

    def __init__(self, read: Callable[[Block], Iterator[Rows]], *, ahead: bool) -> None:
        self._read, self._ahead = read, ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-unit")
        self._begun: _Begun | None = None

    def rows(self, block: Block) -> Iterator[Rows]:
        """The block's rows; what was begun of another block is dropped."""
        begun = self._begun
        if begun is None or begun.block != block:
            self._drop()
            yield from self._read(block)
            return
        self._begun = None
        first = begun.first.result()
        if first is not None:
            yield first
            yield from begun.rows

    def begin(self, block: Block | None) -> None:
        """Start to read a block that is likely the next; None: none is."""
        if self._ahead and block is not None and self._begun is None:
            rows = self._read(block)
            self._begun = _Begun(block=block, rows=rows, first=self._thread.submit(next, rows, None))

    def _drop(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            with contextlib.suppress(Exception):  # an error belongs to its unit, which another rank makes
                begun.first.result()
            begun.rows.close()  # type: ignore[attr-defined]

    def __enter__(self) -> UnitReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()
        self._thread.shutdown()
