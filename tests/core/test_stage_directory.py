"""Units, records and the manifest: resuming, sharing and refusing."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage, read_manifest, require_free_bytes
from mlpmem_ds.core.world import World

UNITS = [f"{number}" for number in range(5)]


@dataclass(frozen=True, kw_only=True)
class Config:
    output: Path = option("directory")
    factor: int = option("factor", 2)
    threads: int = option("threads", 1, identity=False)


def run(config: Config, world: World, *, fail_at: str | None = None, input_hash: str = "i") -> list[str]:
    """A stage of five units; returns those computed by this call."""
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={"corpus": input_hash}, world=world
    )
    computed: list[str] = []

    def compute(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        writer.array(f"part-{unit}.npy", np.arange(4) * int(unit) * config.factor)
        if unit == fail_at:
            raise RuntimeError("killed")
        computed.append(unit)
        return {"sum": int(unit)}

    directory.run_units(UNITS, compute)
    directory.finish(UNITS, lambda: {"total": sum(summary["sum"] for summary in directory.summaries(UNITS))})
    return computed


def result_of(root: Path) -> dict[str, str]:
    """Name → hash of all that belongs to the result."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }


@pytest.fixture
def straight(tmp_path: Path) -> dict[str, str]:
    run(Config(output=tmp_path / "straight"), World())
    return result_of(tmp_path / "straight")


def test_a_broken_run_continues_to_the_same_bytes(tmp_path: Path, straight: dict[str, str]) -> None:
    config = Config(output=tmp_path / "broken")
    with pytest.raises(RuntimeError):
        run(config, World(), fail_at="3")
    with pytest.raises(UserError, match="not complete"):
        read_manifest(config.output, stage="toy", version=1, flag="--toy")
    assert run(config, World()) == ["3", "4"]
    assert result_of(config.output) == straight
    assert run(config, World()) == []


@pytest.mark.parametrize("size", [2, 3, 7])
def test_any_number_of_ranks_gives_the_same_bytes(tmp_path: Path, straight: dict[str, str], size: int) -> None:
    config = Config(output=tmp_path / "shared")
    for rank in reversed(range(size)):
        run(config, World(rank=rank, size=size))
    assert result_of(config.output) == straight


def test_a_flipped_byte_costs_one_unit(tmp_path: Path, straight: dict[str, str]) -> None:
    config = Config(output=tmp_path / "flipped")
    run(config, World())
    path = config.output / "part-2.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run(config, World()) == ["2"]
    assert result_of(config.output) == straight


def test_a_damaged_record_costs_one_unit(tmp_path: Path, straight: dict[str, str]) -> None:
    config = Config(output=tmp_path / "record")
    run(config, World())
    (config.output / "done" / "1.json").write_text("{")
    assert run(config, World()) == ["1"]
    assert result_of(config.output) == straight


def test_a_damaged_unit_that_comes_out_different_is_refused(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    run(config, World())
    (config.output / "part-2.npy").write_bytes(b"")
    directory = open_stage(config.output, stage="toy", version=1, config=config, inputs={"corpus": "i"}, world=World())
    for _ in range(2):  # also the second time: the old record still says what it was
        with pytest.raises(DamagedDataError, match="came out different"):
            directory.run_units(UNITS, lambda unit, writer: writer.array(f"part-{unit}.npy", np.zeros(9)))
        assert not directory.manifest_path.exists()


def test_waiting_sees_through_a_record_whose_file_is_damaged(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    run(config, World())
    directory = open_stage(config.output, stage="toy", version=1, config=config, inputs={"corpus": "i"}, world=World())
    directory.wait_for(UNITS)
    good = (config.output / "part-1.npy").read_bytes()
    (config.output / "part-1.npy").write_bytes(good[:-1])
    repair = threading.Timer(0.5, lambda: (config.output / "part-1.npy").write_bytes(good))
    repair.start()
    start = time.monotonic()
    directory.wait_for(UNITS)
    assert time.monotonic() - start > 0.2
    repair.join()


def test_another_run_is_refused_and_says_what_changed(tmp_path: Path) -> None:
    run(Config(output=tmp_path / "toy"), World())
    before = result_of(tmp_path / "toy")
    with pytest.raises(UserError, match=r"config\.factor was 2, now 3.*--output"):
        run(Config(output=tmp_path / "toy", factor=3), World())
    with pytest.raises(UserError, match=r"inputs\.corpus was 'i', now 'j'"):
        run(Config(output=tmp_path / "toy"), World(), input_hash="j")
    assert result_of(tmp_path / "toy") == before
    assert run(Config(output=tmp_path / "toy", threads=4), World()) == []


def test_a_strangers_directory_or_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        run(Config(output=tmp_path / "theirs"), World())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        run(Config(output=tmp_path / "file"), World())
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.tex"]


def test_readers_refuse_what_is_missing_foreign_or_damaged(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(config.output, stage="toy", version=1, flag="--toy")
    run(config, World())
    manifest, sha256 = read_manifest(config.output, stage="toy", version=1, flag="--toy")
    assert manifest["total"] == 10 and len(sha256) == 64
    with pytest.raises(UserError, match="not mlpmem-keys"):
        read_manifest(config.output, stage="keys", version=1, flag="--keys")
    with pytest.raises(DamagedDataError, match="version 1, this program reads 2"):
        read_manifest(config.output, stage="toy", version=2, flag="--toy")
    (config.output / "part-4.npy").write_bytes(b"short")
    with pytest.raises(DamagedDataError, match=r"part-4\.npy has 5 bytes"):
        read_manifest(config.output, stage="toy", version=1, flag="--toy")


def test_a_full_disk_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="free some space"):
        require_free_bytes(tmp_path / "not" / "yet", 1 << 60, what="the keys")
    require_free_bytes(tmp_path, 1, what="the keys")
