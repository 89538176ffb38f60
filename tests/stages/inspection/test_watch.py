from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.inspection import watch as module
from mlpmem_ds.stages.inspection.inspect_run import Config, run
from mlpmem_ds.stages.inspection.watch import RunWatch, stage_roots

from ...core import toy_stage
from .test_progress import phase, started, units
from .test_prometheus import parsed

ROOT = Path(__file__).parents[3]


def make_stage(root: Path, num_units: int) -> Path:
    """A stage at work, with so many units and their files."""
    (root / "done").mkdir(parents=True)
    publish_json(root / "identity.json", {"format": "mlpmem-toy"}, seal=True)
    names = [f"{number:06d}" for number in range(num_units)]
    for name in names:
        (root / "done" / f"{name}.json").touch()
        (root / f"{name}.npy").touch()
    lines = [started(), phase(2 * num_units, 2 * num_units), *units(names, 0.01, last=1)]
    (root / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def calls_of_a_round(run_dir: Path, new_units: int) -> int:
    watch = RunWatch(run_dir)
    watch.look()
    for stage in run_dir.iterdir():
        with open(stage / "log.jsonl", "a") as log:
            log.writelines(
                json.dumps(line) + "\n" for line in units([f"new-{n}" for n in range(new_units)], 1, last=0)
            )
    with counted_calls(run_dir) as calls:
        progress = watch.look()
    assert all(stage.state == "working" and stage.done >= new_units for stage in progress.stages)
    return calls["opens"] + calls["stats"] + calls["listings"]


def test_a_round_costs_as_much_as_there_are_stages_and_nothing_a_unit(tmp_path: Path) -> None:
    costs = {}
    for num_stages, num_units in ((1, 5), (1, 2000), (6, 5), (6, 400)):
        run_dir = tmp_path / f"{num_stages}-{num_units}"
        for number in range(num_stages):
            make_stage(run_dir / f"stage-{number}", num_units)
        costs[num_stages, num_units] = calls_of_a_round(run_dir, new_units=num_units)
    assert costs[1, 5] == costs[1, 2000] and costs[6, 5] == costs[6, 400]
    assert costs[6, 5] <= 1 + 4 * 6


def test_the_first_look_lists_folders_and_opens_no_record(tmp_path: Path) -> None:
    make_stage(tmp_path / "run" / "keys", 500)
    with counted_calls(tmp_path) as calls:
        RunWatch(tmp_path / "run").look()
    assert calls["opens"] + calls["stats"] + calls["listings"] < 20


def test_new_stages_are_seen_at_once_and_inner_ones_in_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    make_stage(run_dir / "keys", 3)
    watch = RunWatch(run_dir)
    assert [stage.name for stage in watch.look().stages] == ["keys"]
    make_stage(run_dir / "targets", 3)
    make_stage(run_dir / "targets" / "lists", 3)
    (run_dir / "targets" / "shards").mkdir()
    assert {stage.name for stage in watch.look().stages} == {"keys", "targets", "targets/lists"}
    make_stage(run_dir / "targets" / "audit" / "a", 3)
    assert len(watch.look().stages) == 3
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_DISCOVERIES", 0.0)
    assert len(watch.look().stages) == 4
    assert set(stage_roots(run_dir / "keys")) == {run_dir / "keys"}


def test_prometheus_once_writes_a_whole_file_and_compares_none(tmp_path: Path) -> None:
    toy_stage.run(toy_stage.Config(output=tmp_path / "run" / "toy"), World())
    (tmp_path / "run" / "toy" / "part-1.npy").write_bytes(b"")  # damaged, which is not looked for
    run(Config(run=tmp_path / "run", prometheus=tmp_path / "run.prom"), World())
    found = parsed((tmp_path / "run.prom").read_text())
    assert found["mlpmem_stage_complete"] == {(("run", "run"), ("stage", "toy")): 1}
    with pytest.raises(UserError, match=r"reads \*\.prom alone"):
        run(Config(run=tmp_path / "run", prometheus=tmp_path / "run.txt"), World())


@pytest.mark.parametrize("flags", [{"watch": 0.01}, {"prometheus": "x.prom"}])
def test_a_place_without_a_stage_is_refused(tmp_path: Path, flags: dict) -> None:
    """A mistyped path, in a crontab too: no figures of it are written."""
    named = {name: tmp_path / value if name == "prometheus" else value for name, value in flags.items()}
    (tmp_path / "wrong").mkdir()
    with pytest.raises(UserError, match=r"wrong holds no stage of this project .*: give a run directory"):
        run(Config(run=tmp_path / "wrong", **named), World())
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"watch": 1.0, "output": Path("x")}, "--watch and --prometheus look on"),
        ({"watch": 1.0, "discard": "a"}, "--watch and --prometheus look on"),
        ({"yes": True}, "--yes is of --discard: add that, or leave it out"),
        ({"watch": 1.0, "threads": 2}, "--watch compares no files: leave out --threads"),
        (
            {"prometheus": Path("x.prom"), "checksums": False},
            "--prometheus compares no files: leave out --no-checksums",
        ),
        (
            {"discard": "a", "threads": 2, "checksums": False},
            "--discard compares no files: leave out --threads and --no-checksums",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Config(run=Path("run"), **flags)


@pytest.mark.parametrize("on_terminal", [False, True])
def test_ctrl_c_ends_the_watch_with_exit_code_0(tmp_path: Path, on_terminal: bool) -> None:
    """As a user starts it, while a stage is made complete."""
    make_stage(tmp_path / "run" / "keys", 3)
    command = [sys.executable, str(ROOT / "tools/inspect_run.py"), str(tmp_path / "run"), "--watch", "0.2"]
    command += ["--prometheus", str(tmp_path / "run.prom")]
    master, slave = pty.openpty() if on_terminal else os.pipe()
    process = subprocess.Popen(
        command, stdout=slave, stderr=subprocess.PIPE, env=os.environ | {"COLUMNS": "200", "TERM": "xterm"}
    )
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + 60
    while b"3 of 6 units" not in shown and time.monotonic() < deadline:
        shown += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    os.close(master)
    assert b"3 of 6 units" in shown and (b"\x1b[?1049h" in shown) is on_terminal
    assert (process.returncode, complaint) == (0, b"")
    assert "mlpmem_stage_working" in parsed((tmp_path / "run.prom").read_text())
