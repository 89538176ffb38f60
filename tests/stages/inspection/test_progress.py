"""How far a stage is, from lines as the stages write them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.claims import holder
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.stages.inspection.progress import StageProgress, StageWatch

from ...core import toy_stage

ALIVE, ELSEWHERE = holder(os.getppid()), "n7 boot 12"


def event(kind: str, seconds_ago: float = 5, rank: int = 0, **fields: Any) -> dict[str, Any]:
    return {"time": time.time() - seconds_ago, "rank": rank, "event": kind, **fields}


def started(seconds_ago: float = 900, rank: int = 0, world: int = 1, process: str = ALIVE) -> dict[str, Any]:
    return event("started", seconds_ago, rank, world=world, process=process)


def phase(count: int, missing: int, rank: int = 0, of: str = "units") -> dict[str, Any]:
    return event("phase", 890, rank, of=of, count=count, missing=missing)


def units(names: list[str], every: float, *, last: float, rank: int = 0) -> list[dict[str, Any]]:
    """Units made one after another, the last one so many seconds ago."""
    count = len(names)
    return [
        event("unit", last + every * (count - 1 - number), rank, unit=name, seconds=every, bytes=1000)
        for number, name in enumerate(names)
    ]


def look(root: Path, *events: dict[str, Any], records: int = 0, log: str = "log.jsonl") -> StageProgress:
    (root / "done").mkdir(parents=True, exist_ok=True)
    for number in range(records):
        (root / "done" / f"old-{number}.json").touch()
    with open(root / log, "a") as stream:
        stream.writelines(json.dumps(one) + "\n" for one in events)
    watch = StageWatch(root, "toy")
    watch.open_logs()
    return watch.look()


def test_units_of_several_ranks_and_starts_count_once(tmp_path: Path) -> None:
    found = look(
        tmp_path,
        started(5000),
        phase(10, 10),
        *units(["a", "b"], 10, last=4000),
        *(started(900, rank, 2) for rank in (0, 1)),
        *(phase(10, 7, rank) for rank in (0, 1)),
        *units(["b", "c"], 10, last=5),  # b was damaged
        *units(["d", "e", "f"], 10, last=5, rank=1),
        records=1,
    )
    assert (found.state, found.done, found.total, found.num_bytes) == ("working", 7, 10, 6000)
    assert [(rank.rank, rank.state, rank.units) for rank in found.ranks] == [
        (0, "working", 2),
        (1, "working", 3),
    ]
    assert found.per_second == pytest.approx(0.2) and found.seconds_left == pytest.approx(15)
    assert found.slowest is None and found.error is None


def test_the_slowest_rank_is_named_also_by_a_unit_that_does_not_end(tmp_path: Path) -> None:
    logs = [started(900, rank, 3) for rank in range(3)] + [phase(99, 99, rank) for rank in range(3)]
    logs += units(["a", "b", "c"], 10, last=1) + units(["d", "e", "f"], 12, last=1, rank=1)
    slow = look(tmp_path / "slow", *logs, *units(["g", "h"], 30, last=1, rank=2)).slowest
    assert slow is not None and slow.rank == 2 and slow.factor == pytest.approx(30 / 12)
    hanging = look(tmp_path / "hanging", *logs, *units(["g", "h"], 11, last=120, rank=2)).slowest
    assert hanging is not None and hanging.rank == 2 and hanging.factor == pytest.approx(10, rel=0.1)


def test_what_became_of_each_rank(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    processes = [ALIVE, ELSEWHERE, ELSEWHERE, holder(gone.pid), ALIVE, ALIVE, ALIVE]
    logs = [started(700, rank, 7, process) for rank, process in enumerate(processes)]
    logs += [event("phase", 5, 1, of="units", count=9, missing=9)]
    logs += [event("finished", rank=4, seconds=3), event("ended", rank=5, code=143, message="m")]
    logs += [event("ended", 60, rank=6, code=2, message="the disk is full: free some space")]
    found = look(tmp_path, *logs)
    states = ["working", "working", "silent", "gone", "finished", "stopped", "failed"]
    assert [rank.state for rank in found.ranks] == states and found.state == "working"
    assert found.ranks[1].host == "n7" and found.ranks[2].seconds_since_sign == pytest.approx(700, abs=60)
    assert found.error is not None and (found.error.rank, found.error.code) == (6, 2)
    assert "free some space" in found.error.message
    lost = look(tmp_path, event("ended", 58, rank=0, code=75, message="rank 6 is gone"))
    assert lost.error == found.error  # what failed, not that the others noticed
    ended = look(tmp_path, event("complete", 1, manifest="0"))
    assert ended.error is None  # it was completed since


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ({"event": "ended", "code": 2, "message": "m"}, "failed"),
        ({"event": "ended", "code": 130, "message": "m"}, "stopped"),
        ({"event": "stopped", "step": 5}, "stopped"),
        ({"event": "phase", "of": "units", "count": 2, "missing": 2}, "killed"),
    ],
)
def test_a_stage_without_live_ranks(tmp_path: Path, last: dict[str, Any], state: str) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    found = look(tmp_path, started(process=holder(gone.pid)), {"time": time.time(), "rank": 0, **last})
    assert found.state == state and found.per_second is None and found.seconds_left is None


def test_a_training_counts_steps(tmp_path: Path) -> None:
    lines = [{"step": step, "time": time.time() - 100 + step, "loss": 1.0} for step in range(10, 91, 10)]
    lines.insert(3, {"step": 30, "time": time.time() - 70, "tuning_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logs = [started(7000, rank, 2, ELSEWHERE) for rank in range(2)] + [phase(200, 200, of="steps")]
    found = look(tmp_path, *logs)
    assert (found.of, found.done, found.total) == ("steps", 90, 200)
    assert found.per_second == pytest.approx(1) and found.seconds_left == pytest.approx(110)
    assert [rank.state for rank in found.ranks] == ["working", "working"]  # the steps are signs of all ranks
    checkpoint = tmp_path / "checkpoints" / "step-00000090"
    checkpoint.mkdir(parents=True)
    files = [{"name": "a.pt", "bytes": 700, "sha256": "0"}, {"name": "b.pt", "bytes": 77, "sha256": "0"}]
    publish_json(
        checkpoint / "manifest.json",
        {
            "format": "mlpmem-checkpoint",
            "version": 1,
            "step": 90,
            "world": 1,
            "zero_stage": 0,
            "skipped_steps": 0,
            "subject": {},
            "values": {},
            "files": files,
        },
        seal=True,
    )
    assert look(tmp_path, event("checkpoint", 2, step=90)).num_bytes == 777


def test_the_time_before_a_restart_is_no_time_of_a_step(tmp_path: Path) -> None:
    now = time.time()
    before = [{"step": step, "time": now - 5000 + step} for step in (1, 2, 3)]
    after = [{"step": step, "time": now - 50 + 2 * step} for step in (3, 4, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*before, *after]))
    found = look(tmp_path, started(5010), phase(9, 9, of="steps"), started(60), phase(9, 6, of="steps"))
    assert (found.done, found.total) == (5, 9)
    assert found.per_second == pytest.approx(0.5) and found.seconds_left == pytest.approx(8)
    assert look(tmp_path, started(1)).per_second is None  # not known yet


def test_lines_that_no_stage_wrote_are_left_out(tmp_path: Path) -> None:
    strange = [{"event": "unit"}, {"time": "x", "rank": 0, "event": "unit"}, event("unit", rank=9, unit="a")]
    found = look(tmp_path, started(), phase(4, 4), *strange, {"a": 1}, *units(["a"], 3, last=1))
    assert (found.done, found.total) == (1, 4)


def test_logs_of_other_hosts_are_found_and_a_directory_begun_anew_is_read_anew(tmp_path: Path) -> None:
    look(tmp_path, started(900, 0, 2), phase(9, 9), *units(["a", "b"], 5, last=4))
    (tmp_path / "log-n7.jsonl").write_text(json.dumps(started(900, 1, 2, ELSEWHERE)) + "\n")
    watch = StageWatch(tmp_path, "toy")
    watch.open_logs()
    assert len(watch.look().ranks) == 2 and watch.look().done == 2
    for path in tmp_path.glob("log*"):
        path.unlink()
    watch.look()
    look(tmp_path, started(1), phase(5, 5))
    again = watch.look()
    assert (again.done, again.total, len(again.ranks)) == (0, 5, 1)


@pytest.mark.parametrize("is_swapped", [False, True])
def test_ranks_are_those_of_the_latest_start_on_whichever_hosts(tmp_path: Path, is_swapped: bool) -> None:
    """Rank 1 was on n7 and is here since, or the other way round: each host has a log, read in any order."""
    processes = [ALIVE, ELSEWHERE] if is_swapped else [ELSEWHERE, ALIVE]
    former = [started(900, 1, 3, processes[0]), phase(9, 9, 1), *units(["a", "b"], 5, last=700, rank=1)]
    former += [event("ended", 600, rank=1, code=143, message="m")]
    latest = [started(90, 1, 2, processes[1]), event("phase", 80, 1, of="units", count=9, missing=7)]
    latest += units(["c"], 5, last=9, rank=1)
    look(tmp_path, started(900, 0, 3), started(90, 0, 2), *(former if is_swapped else latest))
    others = latest if is_swapped else former
    found = look(tmp_path, *others, log="log-n7-b.jsonl")
    assert [(rank.rank, rank.host) for rank in found.ranks] == [
        (0, ALIVE.split()[0]),
        (1, processes[1].split()[0]),
    ]
    assert (found.ranks[1].state, found.ranks[1].units, found.done) == ("working", 1, 3)
    assert found.ranks[1].seconds_since_sign == pytest.approx(9, abs=5) and found.state == "working"


def test_a_log_that_is_found_late_changes_nothing_of_the_latest_start(tmp_path: Path) -> None:
    look(tmp_path, started(90, 0, 2), phase(9, 9), started(90, 1, 2), phase(9, 9, 1))
    watch = StageWatch(tmp_path, "toy")
    watch.open_logs()
    before = watch.look()
    logs = [started(900, 1, 3, ELSEWHERE), phase(9, 9, 1), event("ended", 600, 1, code=2, message="m")]
    (tmp_path / "log-n7-b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logs))
    watch.open_logs()
    after = watch.look()
    assert [(rank.rank, rank.host, rank.state) for rank in after.ranks] == [
        (rank.rank, rank.host, rank.state) for rank in before.ranks
    ]
    assert after.error is None and after.state == "working" and after.started is not None
    assert after.started < time.time() - 800


@pytest.mark.parametrize("logs", [("log.jsonl", "log-n7-b.jsonl"), ("log-n7-b.jsonl", "log.jsonl")])
def test_what_hosts_did_to_one_stage_is_read_in_the_order_of_time(
    tmp_path: Path, logs: tuple[str, str]
) -> None:
    """A unit was made on one host and discarded on the other, after an error that was overcome."""
    n7 = [started(900, 1, 2, ELSEWHERE), *units(["a"], 5, last=800, rank=1)]
    n7 += [event("ended", 700, 1, code=2, message="the disk is full")]
    look(tmp_path, *n7, log=logs[0])
    here = [started(900, 0, 2), event("discarded", 600, units=["a"]), started(90)]
    found = look(tmp_path, *here, event("complete", 80, manifest="0"), log=logs[1])
    assert (found.done, found.error) == (0, None)


def test_a_real_stage_from_start_to_end(tmp_path: Path) -> None:
    config = toy_stage.Config(output=tmp_path / "toy")
    with pytest.raises(RuntimeError):
        toy_stage.run(config, toy_stage.World(), fail_at="3")
    watch = StageWatch(config.output, "toy")
    watch.open_logs()
    first = watch.look()
    assert (first.state, first.done, first.total) == ("working", 3, 5)  # by this process, which lives
    toy_stage.run(config, toy_stage.World())
    last = watch.look()
    assert (last.state, last.done, last.total) == ("complete", 5, 5) and watch.is_idle
    assert last.num_bytes == sum(path.stat().st_size for path in config.output.glob("*.npy"))
