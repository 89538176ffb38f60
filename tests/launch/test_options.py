"""launch/options.sh with commands that write down how they are called: which launcher starts the ranks, and
where a demonstration ends whose training was stopped."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
_FAKES = {
    # The machine's GPUs and cores; any other question has a number for its answer.
    "python": 'case "$*" in *device_count*) echo "$GPUS 2" ;; -c*) echo 4096 ;; *) echo "python $*" >> "$SAID" ;; esac',
    "torchrun": 'echo "torchrun $*" >> "$SAID"',
    "deepspeed": 'echo "deepspeed $*" >> "$SAID"',
}  # fmt: skip


class Machine:
    """Fake commands, and a run that they leave empty."""

    def __init__(self, root: Path) -> None:
        self.run, self.calls, commands = root / "run", root / "said", root / "commands"
        commands.mkdir()
        for name, text in _FAKES.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (commands / name).chmod(0o755)
        self.variables = {"PATH": f"{commands}:{os.environ['PATH']}", "SAID": str(self.calls)}

    def bash(self, *words: str, gpus: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        outer = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        return subprocess.run(
            ["bash", *words, "--no-setup", "--run", str(self.run)],
            env={**outer, **self.variables, "GPUS": str(gpus), **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def said(self) -> list[str]:
        """The calls of commands, a line each."""
        return self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("gpus", "variables", "launcher"),
    [
        (2, {}, "deepspeed"),
        (0, {}, "deepspeed"),
        (2, {"CUDA_VISIBLE_DEVICES": "4,5"}, "torchrun"),
        (2, {"CUDA_VISIBLE_DEVICES": "GPU-a1,MIG-b2"}, "torchrun"),
        (0, {"CUDA_VISIBLE_DEVICES": ""}, "torchrun"),
        (1, {"CUDA_VISIBLE_DEVICES": "4"}, "python"),
    ],
)
def test_a_training_takes_the_gpus_that_it_was_given(
    machine: Machine, gpus: int, variables: dict[str, str], launcher: str
) -> None:
    """DeepSpeed's launcher takes the machine's first ones, also where the variable hides all of them."""
    script = 'set -euo pipefail; options=$1; shift; source "$options"; trained train.py --epochs 1'
    done = machine.bash("-c", script, "bash", str(LAUNCH / "options.sh"), gpus=gpus, **variables)
    assert done.returncode == 0, done.stderr
    (call,) = machine.said()
    assert call.startswith(launcher) and call.endswith("train.py --epochs 1")
