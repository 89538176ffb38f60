"""The `deepspeed` command is told to stop: its ranks save and end, and the run continues."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlpmem_ds.formats.keys import open_keys

from ...launcher_environment import environment_without_launchers

REPOSITORY = Path(__file__).resolve().parents[3]
BATCH = 48
FLAGS = {
    "epochs": 6.0,
    "batch_positions": BATCH,
    "hidden_size": 16,
    "num_blocks": 2,
    "save_every_steps": 100,
    "log_every_steps": 1,
    "shuffle_window_blocks": 4,
    "micro_batch_positions": 12,
}


@pytest.fixture(scope="module")
def runs(make_runs, inputs_dir):
    return make_runs({**FLAGS, "corpus": inputs_dir / "corpus", "targets": inputs_dir / "targets"})


def test_sigterm_to_the_launcher_saves_and_leaves_no_orphan(runs, inputs_dir):
    """`deepspeed` alone is told to stop, and does not tell its ranks; they save, end, and the same command
    continues."""
    bf16 = runs.ds_config(3, bf16=True)
    process = start_deepspeed(runs.job("terminated", bf16))
    metrics, deadline = runs / "terminated" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)  # its ranks share the pipe: it ends when the last of them has
    deadline = time.monotonic() + 30
    while members_of_group(process.pid):
        assert time.monotonic() < deadline, members_of_group(process.pid)
        time.sleep(0.05)
    assert "stopped as asked and saved" in said, said
    assert not (runs / "terminated" / "manifest.json").exists()
    (said,) = runs.succeed(runs.start("terminated", bf16, size=2))
    assert "resuming from" in said
    num_steps = 6 * open_keys(inputs_dir / "keys").num_positions // BATCH
    assert len(runs.losses("terminated")) == num_steps  # each step once


def start_deepspeed(job):
    """launch/train.py with two ranks, in a process group of its own."""
    words = [word for name, value in job.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return subprocess.Popen(
        [Path(sys.executable).parent / "deepspeed", "-q", "--num_accelerators", "2", "--master_port", port]
        + ["launch/train.py", *words],
        env=environment_without_launchers()
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def members_of_group(group):
    """The living processes of a process group."""
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(words[2]) == group and words[0] != "Z":
            living.append(int(stat.parent.name))
    return living
