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
    "python": """
case "$*" in
    *device_count*) echo "$GPUS 2" ;;
    -c*) echo 4096 ;;
    *) echo "python $*" >> "$SAID" ;;
esac""",
    "torchrun": 'echo "torchrun $*" >> "$SAID"',
    "deepspeed": 'echo "deepspeed $*" >> "$SAID"',
}


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


@pytest.mark.parametrize(
    ("kind", "stopped", "last", "next_one"),
    [
        ([], "tools/train_base.py", "2/9", "3/9"),
        (["--base", "b"], "launch/train.py", "6/9", "7/9"),
        (["--pretrained", "--base", "b"], "launch/train.py", "4/8", "5/8"),
    ],
)
def test_a_training_that_was_stopped_ends_the_demonstration(
    machine: Machine, kind: list[str], stopped: str, last: str, next_one: str
) -> None:
    """It has saved, and its ranks end with 0, as a launcher does that was killed. The control would be
    trained for the seconds of a part of the memory, in every later start too."""
    done = machine.bash(str(LAUNCH / "demo.sh"), *kind)
    assert done.returncode == 75
    assert "was stopped before its end: the same command continues" in done.stderr
    assert last in done.stdout and next_one not in done.stdout
    assert stopped in machine.said()[-1] and not list(machine.run.glob("*"))


def test_the_controls_follow_a_memory_that_is_complete(machine: Machine) -> None:
    (machine.run / "memory").mkdir(parents=True)
    (machine.run / "memory" / "manifest.json").touch()
    done = machine.bash(str(LAUNCH / "demo.sh"), "--base", "b")
    assert done.returncode == 75 and f"{machine.run}/memory_ce_only was stopped" in done.stderr
    assert "--alpha 0 " in machine.said()[-1]
