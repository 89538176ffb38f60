"""Inputs are compared with their checksums once, whatever the number of ranks and starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.manifest import CompleteStage, Manifest, read_stage
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World

from .toy_stage import Config


@dataclass(frozen=True, kw_only=True)
class ToyManifest(Manifest):
    FORMAT: ClassVar[str] = "toy"
    VERSION: ClassVar[int] = 1


NAMES = [f"part-{number:02d}.bin" for number in range(50)]


@pytest.fixture
def source(tmp_path: Path) -> CompleteStage[Any]:
    config = Config(output=tmp_path / "toy")
    stage = open_stage(config.output, stage="toy", version=1, config=config, inputs={}, world=World())

    def write(unit: str, writer: Any) -> None:
        with writer.file(unit) as path:
            path.write_bytes(unit.encode() * 10)

    stage.run_units(NAMES, write)
    stage.complete(NAMES, dict)
    return read_stage(CompleteStage, ToyManifest, config.output, flag="--toy")


def reader(root: Path, rank: int) -> StageDirectory:
    world = World(rank=rank, size=2)
    return open_stage(root, stage="reader", version=1, config=Config(output=root), inputs={}, world=world)


def test_each_file_is_read_once_by_one_rank(source: CompleteStage[Any], tmp_path: Path) -> None:
    with counted_calls(source.root) as calls:
        for rank in (0, 1, 0):
            verify_inputs(reader(tmp_path / "reader", rank), source, NAMES, label="parts")
    assert calls["part"] == len(NAMES)


def test_a_flipped_byte_is_found_by_the_rank_that_reads_it(
    source: CompleteStage[Any], tmp_path: Path
) -> None:
    content = (source.root / "part-33.bin").read_bytes()
    (source.root / "part-33.bin").write_bytes(content[:-1] + b"x")
    with pytest.raises(DamagedDataError, match=r"part-33\.bin does not have the checksum"):
        verify_inputs(reader(tmp_path / "reader", 0), source, NAMES, label="parts")


def test_no_files_are_no_units(source: CompleteStage[Any], tmp_path: Path) -> None:
    directory = reader(tmp_path / "reader", 0)
    verify_inputs(directory, source, [], label="parts")
    assert directory.records.listing().recorded == frozenset()
