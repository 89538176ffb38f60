"""Units and records: resuming, sharing among ranks, and disks that fill up."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.core import claims, files, unit_writer
from mlpmem_ds.core.claims import holder
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_array, sha256_of_file
from mlpmem_ds.core.log import read_events
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World

from .toy_stage import UNITS, Config, read_toy, result_of, run


def test_a_broken_run_continues_to_the_same_bytes(tmp_path: Path, straight: dict[str, str]) -> None:
    config = Config(output=tmp_path / "broken")
    with pytest.raises(RuntimeError):
        run(config, World(), fail_at="3")
    with pytest.raises(UserError, match="not complete"):
        read_toy(config.output)
    assert run(config, World()) == ["3", "4"]
    assert result_of(config.output) == straight
    assert run(config, World()) == []


def test_the_log_says_what_is_done_of_how_much_by_which_process(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    with pytest.raises(RuntimeError):
        run(config, World(), fail_at="3")
    run(config, World())
    events = read_events(config.output / "log.jsonl")
    assert [event["event"] for event in events] == [
        *("started", "phase", "unit", "unit", "unit"),
        *("started", "phase", "unit", "unit", "finished", "complete"),
    ]
    phases = [event for event in events if event["event"] == "phase"]
    assert [(event["of"], event["count"], event["missing"]) for event in phases] == [
        ("units", 5, 5),
        ("units", 5, 2),
    ]
    units = {event["unit"]: event["bytes"] for event in events if event["event"] == "unit"}
    assert units == {unit: (config.output / f"part-{unit}.npy").stat().st_size for unit in UNITS}
    assert events[0]["process"] == holder(os.getpid()) and events[0]["world"] == 1
    assert events[-1]["manifest"] == sha256_of_file(config.output / "manifest.json")


def test_the_log_says_that_other_units_of_the_directory_read_its_files(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    directory = open_stage(config.output, stage="toy", version=1, config=config, inputs={}, world=World())
    directory.run_phase(["codec"], lambda unit, writer: writer.array("codec.npy", np.ones(9)))
    directory.run_units(["1"], lambda unit, writer: writer.array("1.npy", np.ones(9)))
    made = [event for event in read_events(config.output / "log.jsonl") if event["event"] == "unit"]
    assert [(event["unit"], event.get("read_here")) for event in made] == [("codec", True), ("1", None)]


@pytest.mark.parametrize("size", [2, 3, 7])
def test_any_number_of_ranks_gives_the_same_bytes(
    tmp_path: Path, straight: dict[str, str], size: int
) -> None:
    config = Config(output=tmp_path / "shared")
    for rank in reversed(range(size)):
        assert run(config, World(rank=rank, size=size), take_over=False) == UNITS[rank::size]
    assert result_of(config.output) == straight


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_alone_finishes_the_work_of_those_that_never_came(
    tmp_path: Path, straight: dict[str, str], rank: int
) -> None:
    config = Config(output=tmp_path / "alone")
    own = [unit for unit in UNITS if int(unit) % 2 == rank]
    computed = run(config, World(rank=rank, size=2))
    assert computed[: len(own)] == own and sorted(computed) == UNITS
    assert computed[len(own)] == [unit for unit in UNITS if unit not in own][-1]  # where the other comes last
    assert result_of(config.output) == straight
    assert run(config, World(rank=1 - rank, size=2)) == []


def test_the_units_of_a_rank_that_died_are_made_and_of_a_live_one_waited_for(
    tmp_path: Path, straight: dict[str, str]
) -> None:
    config = Config(output=tmp_path / "out")
    with pytest.raises(RuntimeError):
        run(config, World(rank=1, size=2), fail_at="1")
    holder = subprocess.Popen(["sleep", "60"])  # a rank of this host that is at unit 3 when it is killed
    (config.output / "done" / ".3.claim").write_text(claims.holder(holder.pid))

    def kill_while_it_waits() -> None:
        while not (config.output / "done" / "1.json").exists():
            time.sleep(0.01)
        time.sleep(0.6)
        holder.kill()

    start = time.monotonic()
    threading.Thread(target=kill_while_it_waits, daemon=True).start()
    assert run(config, World(rank=0, size=2)) == ["0", "2", "4", "1", "3"]
    assert time.monotonic() - start > 0.5
    holder.wait()
    assert result_of(config.output) == straight


def test_a_rank_waits_for_a_phase_and_makes_it_when_its_owner_dies(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "out")
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={}, world=World(rank=1, size=2)
    )
    holder = subprocess.Popen(["sleep", "60"])
    (config.output / "done").mkdir()
    (config.output / "done" / ".first.claim").write_text(claims.holder(holder.pid))
    made: list[float] = []
    killer = threading.Timer(0.6, holder.kill)
    start = time.monotonic()
    killer.start()

    def compute(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        made.append(time.monotonic() - start)
        return {"of": unit}

    assert directory.run_phase(["first"], compute) == [{"of": "first"}]
    holder.wait()
    assert len(made) == 1 and made[0] > 0.5


def open_toy(config: Config, rank: int) -> StageDirectory:
    world = World(rank=rank, size=2)
    return open_stage(config.output, stage="toy", version=1, config=config, inputs={}, world=world)


def test_files_of_a_phase_are_read_once_by_the_rank_that_they_are_dealt_to(tmp_path: Path) -> None:
    """Also when the stage is started again; the others compare sizes."""
    config = Config(output=tmp_path / "out")

    def compute(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        writer.array(f"part-{unit}.npy", np.arange(4) * int(unit))
        return {"sum": int(unit)}

    open_toy(config, 0).run_phase(UNITS, compute)  # makes all
    with counted_calls(config.output) as first:
        assert open_toy(config, 1).run_phase(UNITS, compute) == [{"sum": int(unit)} for unit in UNITS]
    assert first["part"] == len(UNITS[1::2])
    for path in config.output.rglob("*"):  # an hour later, nothing is trusted
        os.utime(path, (time.time() - 3600,) * 2)
    with counted_calls(config.output) as again:
        open_toy(config, 0).run_units(UNITS, compute)
        open_toy(config, 1).run_phase(UNITS, compute)
    assert again["part"] == len(UNITS)


def test_a_rank_compares_the_files_of_a_rank_that_never_came(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "out")

    def compute(unit: str, writer: UnitWriter) -> None:
        writer.array(f"part-{unit}.npy", np.arange(4) * int(unit))

    open_toy(config, 0).run_phase(UNITS, compute)
    good = (config.output / "part-2.npy").read_bytes()
    (config.output / "part-2.npy").write_bytes(good[:-1] + b"x")
    for path in config.output.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)
    open_toy(config, 1).run_phase(UNITS, compute)
    assert (config.output / "part-2.npy").read_bytes() == good


def test_who_waits_returns_when_the_directory_is_complete_also_where_the_writer_dies(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "out")
    run(config, World())
    (config.output / "manifest.json").unlink()
    directory = open_stage(
        config.output,
        stage="toy",
        version=1,
        config=config,
        inputs={"corpus": "i"},
        world=World(rank=1, size=2),
    )
    holder = subprocess.Popen(["sleep", "60"])  # a rank of this host that is killed before its manifest
    (config.output / ".manifest.claim").write_text(claims.holder(holder.pid))
    calls: list[str] = []
    directory.run_units(UNITS, lambda unit, writer: pytest.fail("made already"))
    directory.complete(UNITS, lambda: {"total": 10}, afterwards=lambda: calls.append("not waited"))
    assert not directory.manifest_path.exists()
    threading.Timer(0.6, holder.kill).start()
    directory.complete(UNITS, lambda: {"total": 10}, afterwards=lambda: calls.append("waited"), wait=True)
    holder.wait()
    assert directory.manifest_path.is_file() and calls == ["waited"]


def test_a_manifest_that_a_rank_of_another_host_died_at_is_written_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_SECONDS_UNTIL_DEAD", 0.5)
    config = Config(output=tmp_path / "out")
    run(config, World())
    (config.output / "manifest.json").unlink()
    (config.output / ".manifest.claim").write_text("elsewhere boot 1")
    run(config, World())
    assert (config.output / "manifest.json").is_file()
    assert not (config.output / ".manifest.claim").exists()


def test_units_of_one_rank_alone_are_not_taken_over(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "out")
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={}, world=World(rank=1, size=2)
    )
    assert directory.run_units(["0"], lambda unit, writer: pytest.fail("not mine"), take_over=False) == 0
    directory.complete(["0"], dict, afterwards=lambda: pytest.fail("not complete"))
    assert not directory.manifest_path.exists()


@pytest.mark.parametrize("left", ["", "another-host another-boot 12 34"])
def test_what_a_killed_run_left_of_a_claim_keeps_no_lone_rank_out(tmp_path: Path, left: str) -> None:
    """A claim without a name, and one of another host, tell only in time that their holder is gone."""
    directory = open_stage(
        tmp_path / "toy",
        stage="toy",
        version=1,
        config=Config(output=tmp_path / "toy"),
        world=World(),
        inputs={},
    )
    place = directory.records.claim_path("0")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(left)
    made = directory.run_units(["0"], lambda unit, writer: {}, take_over=False)
    assert made == 1 and directory.records.path("0").is_file()


def test_a_complete_directory_keeps_no_claim_of_a_rank_killed_on_another_host(tmp_path: Path) -> None:
    """Killed after its unit's record and before its claim was removed."""
    config = Config(output=tmp_path / "toy")
    with pytest.raises(RuntimeError):
        run(config, World(), fail_at="3")
    left = config.output / "done" / ".0.claim"
    assert left.parent.is_dir()
    left.write_text("another-host another-boot 12 34")
    run(config, World())
    assert not left.exists()


def test_one_rank_goes_on_afterwards(tmp_path: Path) -> None:
    calls: list[int] = []

    def complete(rank: int) -> None:
        directory = open_stage(
            tmp_path / "out",
            stage="toy",
            version=1,
            config=Config(output=tmp_path / "out"),
            inputs={},
            world=World(rank=rank, size=3),
        )
        directory.run_units(UNITS, lambda unit, writer: None)
        directory.complete(UNITS, dict, afterwards=lambda: calls.append(rank))

    for rank in (1, 2, 0):
        complete(rank)
    assert calls == [1, 0]


class Disk:
    """A disk with room for so many files: the flush after it fails, as a delayed write does."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._flush = files.flush

    def flush(self, path: Path) -> None:
        self.room -= path.is_file()
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        self._flush(path)


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4, 9])
def test_a_disk_that_fills_up_leaves_nothing_half_done(
    tmp_path: Path, straight: dict[str, str], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(output=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", Disk(room).flush)
        with pytest.raises(OSError, match="No space left"):
            run(config, World())
    left = result_of(config.output)
    assert left.items() <= straight.items() and "manifest.json" not in left
    run(config, World())
    assert result_of(config.output) == straight


def test_a_small_disk_gives_an_error_with_a_number_and_a_name(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk]).returncode:
        pytest.skip("may not mount a file system")
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            publish_array(disk / "large.npy", np.zeros(1 << 20))
        assert caught.value.errno == errno.ENOSPC
        assert list(disk.iterdir()) == []
        publish_array(disk / "small.npy", np.arange(5))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_whoever_completes_is_heard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run(Config(output=tmp_path / "by_another"), World(rank=1, size=2))
        run(Config(output=tmp_path / "by_the_first"), World(rank=0, size=2))
    said = [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if "complete: " in record.getMessage()
    ]
    assert [level for level, _ in said] == ["WARNING", "INFO"]  # of ranks above 0, warnings only are shown
    assert "by_another" in said[0][1] and "by_the_first" in said[1][1]


def test_the_folder_of_a_units_files_is_flushed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    for module in (files, unit_writer):
        monkeypatch.setattr(module, "flush", flushed.append)
    directory = open_toy(Config(output=tmp_path / "out"), 0)
    flushed.clear()

    def compute(unit: str, writer: UnitWriter) -> None:
        for number in range(4):
            writer.array(f"{number}.npy", np.zeros(3))
        with writer.array_file("inner/b.npy", (0,), np.dtype("<f4")):
            pass

    directory.run_units(["0", "1"], compute, take_over=False)
    folders = [path.relative_to(directory.root).as_posix() for path in flushed if path.is_dir()]
    assert sorted(folders) == [".", "done", "inner"]  # the second folder is the record's
