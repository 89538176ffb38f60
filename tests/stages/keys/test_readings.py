"""The next unit is begun while this one's files are finished, and its rows do not change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.array_files import ArrayWriter
from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.keys.config import Config
from mlpmem_ds.stages.keys.readings import Rows, UnitReader

FIRST, SECOND, THIRD = Block(0, 4), Block(4, 8), Block(8, 10)


class Reading:
    """Rows of two positions each; what was begun and closed."""

    def __init__(self) -> None:
        self.begun: list[Block] = []
        self.closed: list[Block] = []
        self.fails = False

    def __call__(self, block: Block) -> Iterator[Rows]:
        self.begun.append(block)
        try:
            for start in range(block.start, block.stop, 2):
                if self.fails:
                    raise RuntimeError("the base failed")
                yield Rows(block=Block(start, start + 2), arrays={}, num_clipped=0, seconds=0.0)
        finally:
            self.closed.append(block)


def starts(rows: Iterator[Rows]) -> list[int]:
    return [each.block.start for each in rows]


def test_a_block_that_was_begun_is_read_on() -> None:
    read = Reading()
    with UnitReader(read, ahead=True) as reader:
        assert starts(reader.rows(FIRST)) == [0, 2]
        reader.begin(SECOND)
        assert starts(reader.rows(SECOND)) == [4, 6]
        reader.begin(None)
        assert starts(reader.rows(THIRD)) == [8]
    assert read.begun == read.closed == [FIRST, SECOND, THIRD]


def test_a_block_that_another_rank_took_is_dropped() -> None:
    read = Reading()
    with UnitReader(read, ahead=True) as reader:
        reader.begin(SECOND)
        assert starts(reader.rows(THIRD)) == [8]
        reader.begin(FIRST)
    assert sorted(read.closed) == [FIRST, SECOND, THIRD]


def test_an_error_is_that_of_its_unit() -> None:
    read = Reading()
    with UnitReader(read, ahead=True) as reader:
        read.fails = True
        reader.begin(SECOND)
        with pytest.raises(RuntimeError, match="the base failed"):
            list(reader.rows(SECOND))
        reader.begin(THIRD)  # and one that is dropped is no one's


def test_a_cpu_does_not_read_ahead() -> None:
    read = Reading()
    with UnitReader(read, ahead=False) as reader:
        reader.begin(SECOND)
        assert read.begun == []


def test_the_base_reads_on_while_the_disk_hangs(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first unit's rows are not written before the second's are read; the files are the same."""
    expected = replace(config, output=tmp_path / "expected")
    extract_keys.run(expected, World())
    reading, append, second = extract_keys.read_block, ArrayWriter.append, threading.Event()
    num_blocks = 0

    def read(*given: object) -> Iterator[Rows]:
        nonlocal num_blocks
        num_blocks += 1
        for rows in reading(*given):  # type: ignore[arg-type]
            if num_blocks == 2:
                second.set()
            yield rows

    def wait(self: ArrayWriter, rows: object) -> None:
        assert second.wait(20), "the second unit is not read before the first one is written"
        append(self, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(extract_keys, "read_block", read)
    monkeypatch.setattr(extract_keys, "are_read_ahead", lambda bases: True)
    monkeypatch.setattr(ArrayWriter, "append", wait)
    extract_keys.run(replace(config, batch_windows=1000), World())
    assert num_blocks > 1
    names = {path.name for path in config.output.glob("*.npy")}
    assert names and names == {path.name for path in expected.output.glob("*.npy")}
    for name in names:
        assert (config.output / name).read_bytes() == (expected.output / name).read_bytes()


class TakesAll:
    """A counter of two ranks of which the other takes nothing."""

    rank, size = 1, 2

    def __init__(self) -> None:
        self._numbers: dict[str, Iterator[int]] = {}

    def next_number(self, counter: str) -> int:
        return next(self._numbers.setdefault(counter, count()))

    def wait(self) -> None:
        """The other rank is there."""


def test_the_unit_that_is_begun_is_the_one_that_is_dealt_next(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that were launched together take units from a counter, not every size-th one."""
    read, begun = list[Block](), list[Block]()
    reading, begin = extract_keys.read_block, UnitReader.begin

    def counted(*given: Any) -> Iterator[Rows]:
        read.append(given[-1])
        yield from reading(*given)

    def noted(reader: UnitReader, block: Block | None) -> None:
        begun.extend([] if block is None else [block])
        begin(reader, block)

    monkeypatch.setattr(extract_keys, "read_block", counted)
    monkeypatch.setattr(extract_keys, "are_read_ahead", lambda bases: True)
    monkeypatch.setattr(UnitReader, "begin", noted)
    extract_keys._extract(config, World(rank=1, size=2), TakesAll())  # type: ignore[arg-type]
    assert len(read) > 2 and begun == read[1:] and len(set(read)) == len(read)
