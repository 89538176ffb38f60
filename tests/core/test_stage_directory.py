"""Units, records and the manifest: resuming, sharing and refusing."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core import files
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_array, read_json
from mlpmem_ds.core.manifest import read_manifest
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage
from mlpmem_ds.core.world import World

UNITS = [f"{number}" for number in range(5)]


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    output: Path = option("directory")
    factor: int = option("factor", 2)
    threads: int = option("threads", 1, identity="none")


@dataclass(frozen=True, kw_only=True)
class OtherConfig(Flags):
    depth: int = option("depth", 3)


def run(
    config: Config, world: World, *, fail_at: str | None = None, input_hash: str = "i", take_over: bool = True
) -> list[str]:
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

    directory.run_units(UNITS, compute, take_over=take_over)
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
    (config.output / "done" / ".3.claim").write_text(f"{socket.gethostname()} {holder.pid}")
    killer = threading.Timer(0.6, holder.kill)
    killer.start()
    start = time.monotonic()
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
    (config.output / "done" / ".first.claim").write_text(f"{socket.gethostname()} {holder.pid}")
    made: list[str] = []
    directory.run_units(["first"], lambda unit, writer: made.append(unit))
    assert made == []
    killer = threading.Timer(0.3, holder.kill)
    killer.start()
    directory.wait_for(["first"])
    holder.wait()
    assert made == ["first"]


def test_units_of_one_rank_alone_are_not_taken_over(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "out")
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={}, world=World(rank=1, size=2)
    )
    assert directory.run_units(["0"], lambda unit, writer: pytest.fail("not mine"), take_over=False) == 0
    assert directory.finish(["0"], dict) is False


def test_one_rank_speaks(tmp_path: Path) -> None:
    def finish(rank: int) -> bool:
        directory = open_stage(
            tmp_path / "out",
            stage="toy",
            version=1,
            config=Config(output=tmp_path / "out"),
            inputs={},
            world=World(rank=rank, size=3),
        )
        directory.run_units(UNITS, lambda unit, writer: None)
        return directory.finish(UNITS, dict)

    assert [finish(rank) for rank in (1, 2, 0)] == [True, False, True]


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


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["manifest.json", "done/2.json", "identity.json"])
def test_a_flipped_digit_of_our_own_notes_is_mended_by_the_same_command(
    tmp_path: Path, straight: dict[str, str], name: str
) -> None:
    """Each of them still parses; that of the record would say that the unit has other bytes when made
    again."""
    config = Config(output=tmp_path / "toy")
    run(config, World())
    path = config.output / name
    flip(path, path.read_bytes().index({"identity.json": b"corpus"}.get(name, b"sha256")) + 10)
    assert run(config, World()) == (["2"] if name == "done/2.json" else [])
    assert result_of(config.output) == straight


def test_a_damaged_identity_is_written_anew_only_where_the_units_were_made_for_it(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    with pytest.raises(RuntimeError):
        run(config, World(), fail_at="3")
    for harm in ("not valid", "missing"):
        if harm == "missing":
            (config.output / "identity.json").unlink()
        else:
            (config.output / "identity.json").write_text("{")
        with pytest.raises(
            DamagedDataError, match=rf"identity\.json is {harm}.*or remove .*toy to start anew"
        ):
            run(Config(output=tmp_path / "toy", factor=3), World())
    assert run(config, World()) == ["3", "4"]

    open_stage(tmp_path / "new", stage="toy", version=1, config=config, inputs={}, world=World())
    (tmp_path / "new" / "identity.json").write_text("{")
    run(Config(output=tmp_path / "new", factor=3), World())  # nothing was made yet
    assert "3" in (tmp_path / "new" / "identity.json").read_text()


@dataclass(frozen=True, kw_only=True)
class LaterConfig(Config):
    """A later program's: with one flag more."""

    depth: int = option("depth", 7)


def test_a_new_flag_with_its_default_continues_an_old_directory(
    tmp_path: Path, straight: dict[str, str]
) -> None:
    with pytest.raises(RuntimeError):
        run(Config(output=tmp_path / "toy"), World(), fail_at="3")
    assert run(LaterConfig(output=tmp_path / "toy"), World()) == ["3", "4"]
    assert result_of(tmp_path / "toy") == straight
    with pytest.raises(UserError, match=r"\(--depth was 7, now 8\)"):
        run(LaterConfig(output=tmp_path / "toy", depth=8), World())
    run(LaterConfig(output=tmp_path / "other", depth=8), World())
    with pytest.raises(UserError, match=r"\(--depth was 8, now none\)"):  # and an old program a new directory
        run(Config(output=tmp_path / "other"), World())


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Flags):
    output: Path = option("directory")
    search: str = option("auto, exact or ivf", "auto", identity="resolved")
    nprobe: int = option("lists, with ivf", 32, identity="resolved")


def test_a_resolved_flag_decides_by_what_the_stage_made_of_it(tmp_path: Path) -> None:
    def open_with(resolved: dict[str, Any], **flags: Any) -> None:
        config = ResolvedConfig(output=tmp_path / "toy", **flags)
        open_stage(
            config.output, stage="toy", version=1, config=config, inputs={}, world=World(), resolved=resolved
        )

    open_with({"search": "exact", "nprobe": 32})
    open_with({"search": "exact", "nprobe": 32}, search="exact", nprobe=9)  # which decides nothing here
    assert read_json(tmp_path / "toy" / "identity.json")["config"] == {"search": "exact"}
    with pytest.raises(UserError, match=r"\(--nprobe was 32, now 9; --search was 'exact', now 'ivf'\)"):
        open_with({"search": "ivf", "nprobe": 9})
    for incomplete in ({}, {"search": "exact"}, {"search": "exact", "nprobe": 32, "output": "x"}):
        with pytest.raises(AssertionError, match="too many or missing"):
            open_with(incomplete)


def test_one_command_may_write_directories_that_different_flags_decide(tmp_path: Path) -> None:
    def open_with(factor: int) -> None:
        config = LaterConfig(output=tmp_path, factor=factor, depth=9)
        open_stage(
            tmp_path / "toy",
            stage="toy",
            version=1,
            config=config,
            inputs={},
            world=World(),
            flags=("depth",),
        )

    open_with(5)
    assert read_json(tmp_path / "toy" / "identity.json")["config"] == {"depth": 9}
    open_with(6)


def test_a_damaged_unit_that_comes_out_different_is_refused(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    run(config, World())
    (config.output / "part-2.npy").write_bytes(b"")
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={"corpus": "i"}, world=World()
    )
    for _ in range(2):  # also the second time: the old record still says what it was
        with pytest.raises(DamagedDataError, match="has other bytes"):
            directory.run_units(UNITS, lambda unit, writer: writer.array(f"part-{unit}.npy", np.zeros(9)))
        assert not directory.manifest_path.exists()


def test_a_damaged_unit_is_not_there_until_it_is_made_again(tmp_path: Path, straight: dict[str, str]) -> None:
    """Another rank must not complete the directory meanwhile, and does not make again what was just
    mended."""
    config = Config(output=tmp_path / "toy")
    run(config, World())
    (config.output / "part-2.npy").write_bytes(b"")
    first, second = (
        open_stage(
            config.output,
            stage="toy",
            version=1,
            config=config,
            inputs={"corpus": "i"},
            world=World(rank=rank, size=2),
        )
        for rank in range(2)
    )
    seen: list[bool] = []

    def compute(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        seen.append(second.finish(UNITS, lambda: {"total": 10}) or second.manifest_path.exists())
        writer.array(f"part-{unit}.npy", np.arange(4) * int(unit) * config.factor)
        return {"sum": int(unit)}

    first.run_units(UNITS, compute)
    assert seen == [False]
    assert not second._make("2", compute) and seen == [False]
    assert first.finish(UNITS, lambda: {"total": 10})
    assert result_of(config.output) == straight


def test_a_damaged_manifest_is_the_users_error(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    run(config, World())
    path = config.output / "manifest.json"
    good = path.read_text()
    for bad in (good.replace('"files"', '"filas"'), good.replace('"sha256"', '"sha255"'), "[]", good[:50]):
        path.write_text(bad)
        with pytest.raises(DamagedDataError, match="manifest"):
            read_manifest(config.output, stage="toy", version=1, flag="--toy")


def test_waiting_sees_through_a_record_whose_file_is_damaged(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    run(config, World())
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={"corpus": "i"}, world=World()
    )
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
    with pytest.raises(UserError, match=r"--output .*\(--factor was 2, now 3\)"):
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


def test_the_output_of_another_stage_is_refused_by_its_name(tmp_path: Path) -> None:
    run(Config(output=tmp_path / "toy"), World())
    before = result_of(tmp_path / "toy")
    with pytest.raises(UserError, match="holds mlpmem-toy, not mlpmem-keys: choose another directory$"):
        open_stage(tmp_path / "toy", stage="keys", version=1, config=OtherConfig(), inputs={}, world=World())
    assert result_of(tmp_path / "toy") == before


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


def test_readers_refuse_what_is_missing_foreign_or_damaged(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(config.output, stage="toy", version=1, flag="--toy")
    run(config, World())
    manifest, sha256 = read_manifest(config.output, stage="toy", version=1, flag="--toy")
    assert manifest["total"] == 10 and len(sha256) == 64
    with pytest.raises(UserError, match="holds mlpmem-toy, not mlpmem-keys: give the output of extract_keys"):
        read_manifest(config.output, stage="keys", version=1, flag="--keys")
    with pytest.raises(
        UserError, match="is not a directory of mlpmem corpus: give the output of prepare_corpus"
    ):
        read_manifest(tmp_path, stage="corpus", version=1, flag="--corpus")
    with pytest.raises(DamagedDataError, match="version 1, this program reads 2"):
        read_manifest(config.output, stage="toy", version=2, flag="--toy")
    (config.output / "part-4.npy").write_bytes(b"short")
    with pytest.raises(DamagedDataError, match=r"part-4\.npy has 5 bytes"):
        read_manifest(config.output, stage="toy", version=1, flag="--toy")
