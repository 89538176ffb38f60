"""Half-written files: those that no process will finish are removed, those of live writers are not."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mlpmem_ds.core import host
from mlpmem_ds.core.host import process_of, this_process
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.temporaries import (
    is_own_temporary,
    remove_stale_directories,
    remove_stale_temporaries,
    remove_stale_temporaries_of,
    temporary_path,
    time_of_file_system,
    work_path,
    written_bytes,
)
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World

from .toy_stage import Config

DEAD = 2**22 + 1
HOUR = 3600.0


def make(path: Path, *, age: float = 0.0) -> Path:
    path.write_text("half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_only_the_temporaries_of_the_dead_are_removed(tmp_path: Path) -> None:
    here, elsewhere = process_of(DEAD), replace(process_of(DEAD), host="elsewhere")
    names = [f".a.{here.name}.tmp", f".b.{this_process().name}.tmp", f".c.{elsewhere.name}.tmp", "d.tmp"]
    for name in names:
        make(tmp_path / name)
    make(tmp_path / names[1], age=2 * HOUR)  # a live process of this host takes as long as it takes
    remove_stale_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


def test_those_of_one_file_are_looked_for_next_to_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory may be one of the user's, with millions of files below it."""
    (tmp_path / "folder").mkdir()
    dead = f"{process_of(DEAD).name}.tmp"
    own, *others = (
        make(tmp_path / name)
        for name in (
            f".a.npy.{dead}",
            f".b.npy.{dead}",
            f"folder/.a.npy.{dead}",
            f".a.npy.{this_process().name}.tmp",
        )
    )
    monkeypatch.delattr(os, "walk")
    remove_stale_temporaries_of(tmp_path / "a.npy")
    assert not own.exists() and all(path.exists() for path in others)


def test_what_lies_in_a_directory_whole_or_half_is_written(tmp_path: Path) -> None:
    assert written_bytes(tmp_path / "none", ".npy") == 0
    for name in ("a.npy", "keys/b.npy", f"keys/.c.npy.{process_of(DEAD).name}.tmp", "d.json", "done/e.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make(tmp_path / name)
    assert written_bytes(tmp_path, ".npy") == 3 * len("half")


def test_a_process_id_that_is_used_again_is_not_the_process_that_had_it(tmp_path: Path) -> None:
    live = process_of(os.getppid())
    if not live.start:
        pytest.skip("this system does not say when a process started")
    names = [f".a.{replace(live, start=str(int(live.start) + 1)).name}.tmp", f".b.{live.name}.tmp"]
    for name in names:
        make(tmp_path / name)
    remove_stale_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == names[1:]


@pytest.mark.parametrize(
    "other", [{"boot": "0123456789ab"}, {"host": "elsewhere"}, {"host": f"{socket.gethostname()}-4026532001"}]
)
def test_the_files_of_a_live_writer_of_another_machine_stay_also_where_it_has_this_ones_host_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    """Two machines from one image, or two containers: here no process has the writer's id."""
    writer = replace(process_of(DEAD), **other)
    with monkeypatch.context() as there:
        there.setattr(host, "process_of", lambda pid: writer)
        files = [make(temporary_path(tmp_path / "a.npy")), make(temporary_path(tmp_path / "b.npy"))]
        directories = [work_path(tmp_path / "out", ".partial"), work_path(tmp_path / "old", ".partial")]
        for path in directories:
            path.mkdir()
            (path / "weights").touch()
    for path in (files[1], directories[1] / "weights", directories[1]):
        os.utime(path, (time.time() - HOUR - 60,) * 2)
    remove_stale_temporaries(tmp_path)
    assert [path.exists() for path in files] == [True, False]
    assert [remove_stale_directories(tmp_path / name, ".partial") for name in ("out", "old")] == [[], []]
    assert [path.exists() for path in directories] == [True, False]


@pytest.mark.parametrize("host_name", ["vm", "vm.cluster.local", "a.vm"])
def test_names_with_dots_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_name: str
) -> None:
    """Of the file, and of hosts of which one's name ends as the other's."""
    monkeypatch.setattr(host, "host_name", lambda: host_name)
    dead, longer = process_of(DEAD), replace(process_of(DEAD), host=f"x-{host_name}")
    paths = [make(tmp_path / f".a.b.npy.{process.name}.tmp") for process in (dead, longer)]
    remove_stale_temporaries(tmp_path)
    assert [path.exists() for path in paths] == [False, True]


def test_those_of_another_host_go_when_no_process_has_written_for_an_hour(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    old = make(tmp_path / "folder" / ".a.lost-host.77.tmp", age=HOUR + 60)
    young = make(tmp_path / ".b.lost-host.77.tmp", age=HOUR - 60)
    ahead = make(tmp_path / ".c.lost-host.77.tmp", age=-2 * HOUR)
    remove_stale_temporaries(tmp_path)
    assert not old.exists() and young.exists() and ahead.exists()


def test_the_age_is_not_measured_by_this_hosts_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of this host is two hours ahead of the file server's."""
    young, now = make(tmp_path / ".a.lost-host.77.tmp"), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * HOUR)
    assert abs(time_of_file_system(tmp_path) - now) < 60
    remove_stale_temporaries(tmp_path)
    assert young.exists()


def test_at_the_end_of_a_stage_every_unit_is_recorded_and_no_temporary_is_needed(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    stage = open_stage(config.output, stage="toy", version=1, config=config, inputs={}, world=World())
    left = make(config.output / ".part-1.npy.lost-host.77.tmp", age=120)
    in_use = make(config.output / f".log.{this_process().name}.tmp", age=120)
    stage.run_units(["1"], lambda unit, writer: None)
    assert left.exists()
    stage.complete(["1"], dict)
    assert not left.exists() and in_use.exists()


def test_a_live_writer_whose_file_was_removed_makes_its_unit_again(tmp_path: Path) -> None:
    """A process that was stopped for an hour is not told from one that is gone."""
    config = Config(output=tmp_path / "toy")
    stage = open_stage(config.output, stage="toy", version=1, config=config, inputs={}, world=World())
    tries = []

    def write(unit: str, writer: UnitWriter) -> None:
        tries.append(unit)
        with writer.file("part.bin") as path:
            path.write_text(unit)
            if len(tries) == 1:
                path.unlink()

    assert stage.run_units(["1"], write) == 1
    assert tries == ["1", "1"] and (config.output / "part.bin").read_text() == "1"


def test_a_file_that_is_missing_otherwise_is_an_error(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    stage = open_stage(config.output, stage="toy", version=1, config=config, inputs={}, world=World())
    with pytest.raises(FileNotFoundError):
        stage.run_units(["1"], lambda unit, writer: (tmp_path / "no.bin").read_bytes() and None)


def test_a_process_knows_the_names_that_it_gave(tmp_path: Path) -> None:
    own = temporary_path(tmp_path / "a.npy")
    assert own.name == f".a.npy.{this_process().name}.tmp"
    other = replace(this_process(), boot="0123456789ab")
    assert is_own_temporary(str(own))
    assert not is_own_temporary(str(tmp_path / f".a.npy.{other.name}.tmp"))
    assert not is_own_temporary(None)


def test_the_file_systems_clock_is_read_from_a_file_that_leaves_nothing(tmp_path: Path) -> None:
    assert abs(time_of_file_system(tmp_path) - time.time()) < 60
    assert list(tmp_path.iterdir()) == []
