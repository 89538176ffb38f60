"""A cluster with commands of Slurm that write down how they are called. The same with Slurm itself:
tests/cluster/test_slurm.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SLURM = ROOT / "launch" / "slurm"
ALL = (
    "prepare_corpus",
    "train_base",
    "extract_keys",
    "build_index",
    "write_targets",
    "train",
    "fit_gate",
    "evaluate",
    "convert_checkpoint",
)
RESULTS = {
    "extract_keys": "keys/manifest.json",
    "write_targets": "targets/manifest.json",
    "train": "memory/manifest.json",
    "fit_gate": "gate/manifest.json",
    "evaluate": "report/manifest.json",
    "convert_checkpoint": "export/mlpmem_export.json",
}
_FAKES = {
    # Jobs have the numbers 101, 102, …; the one that REFUSED names is not taken.
    "sbatch": """
stage=$*
stage=${stage%.sbatch *}
stage=${stage##*/}
if [ "$1" = --test-only ]; then
    [ "$stage" != "${NOT_POSSIBLE:-}" ] || { echo "sbatch: error: invalid partition" >&2; exit 1; }
    exit 0
fi
[ "$stage" != "${REFUSED:-}" ] || { echo "sbatch: error: too many jobs" >&2; exit 1; }
echo "$@" >> "$FAKE/sbatch"
echo $((100 + $(wc -l < "$FAKE/sbatch")))""",
    "squeue": """
case "$*" in *%T*) echo "${STATE:-RUNNING}" ;; *) echo "${QUEUE:-}" ;; esac""",
    "scancel": 'echo "$*" >> "$FAKE/scancel"; touch "$FAKE/asked"',
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$*" >> "$FAKE/scontrol"; fi',
    # One rank for each word of CODES, one after the other; `gone` leaves no code.
    "srun": """
echo "$*" > "$FAKE/srun"
while [[ $1 = --* ]]; do shift; done
rank=0
for code in $CODES; do
    [ "$code" = gone ] || SLURM_PROCID=$rank CODE=$code "$@" || true
    rank=$((rank + 1))
done
exit 1""",
    # A rank of a stage, which ends with CODE; anything else is Python.
    "python": f"""
if [ -z "${{CODE:-}}" ]; then exec "{sys.executable}" "$@"; fi
env > "$FAKE/environment"
if [[ $CODE = waits* ]]; then
    until [ -e "$FAKE/asked" ]; do sleep .05; done
    [ "$CODE" = waits ] || exit 0
    exit 143
fi
made=$(dirname "$MARK")/checkpoints/step-7
[ "$CODE" != cut ] || {{ mkdir -p "$made.tmp"; touch "$made.tmp/manifest.json" "$made.tmp/weights"; exit 0; }}
[ "$CODE" != saves ] || {{ mkdir -p "$made"; touch "$made/manifest.json"; exit 0; }}
[ "$CODE" != done ] || {{ mkdir -p "$(dirname "$MARK")"; touch "$MARK"; exit 0; }}
exit "$CODE" """,
}


class Cluster:
    """A directory with fake commands, a run and its settings."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "a run"
        self.commands = root / "commands"
        self.commands.mkdir()
        for name, text in _FAKES.items():
            (self.commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (self.commands / name).chmod(0o755)
        self.base = root / "base"
        self.base.mkdir()
        self.settings = root / "settings.sh"
        self.set()

    def set(self, **values: str) -> None:
        """Write the settings: a filled-in copy of the example, with these lines in place of its own."""
        values = {"RUN": f"'{self.run}'", "BASE": str(self.base), "ENVIRONMENT": "true", **values}
        more = values.pop("more", "")
        text = (SLURM / "settings.sh").read_text()
        for name, value in values.items():
            line = f"{name}={value}"
            text, count = re.subn(rf"(?m)^{name}=(\(.*?\)|'[^']*'|\S*)", lambda _, line=line: line, text)
            assert count == 1, name
        self.settings.write_text(f"{text}\n{more}\n")

    def make(self, *names: str) -> None:
        """Directories of the run, as if their stages were complete."""
        for name in names:
            (self.run / name).mkdir(parents=True)
            (self.run / name / "manifest.json").touch()

    def environment(self, **variables: str) -> dict[str, str]:
        path = f"{self.commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return {**kept, "FAKE": str(self.root), "PATH": path, "PYTHONPATH": str(ROOT), **variables}

    def submit(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SLURM / "pipeline.sh"), *words],
            env=self.environment(**variables),
            cwd="/",
            capture_output=True,
            text=True,
            timeout=300,
        )

    def job(self, stage: str, codes: str, **variables: str) -> subprocess.Popen[str]:
        """The batch file of a stage, as Slurm starts it: one rank for each of the codes."""
        given = {
            "CODES": codes,
            "MARK": str(self.run / RESULTS[stage]),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_PER_TASK": "12",
            "SLURM_NTASKS": str(len(codes.split())),
            **variables,
        }
        return subprocess.Popen(
            ["bash", str(SLURM / f"{stage}.sbatch"), str(self.settings)],
            env=self.environment(**given),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def said(self, command: str) -> list[str]:
        """The calls of a command, a line each."""
        path = self.root / command
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)
