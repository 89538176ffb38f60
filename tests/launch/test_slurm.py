"""The batch files for Slurm, run by a fake one: how ranks are started, when a job is queued again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
FRONT_ENDS = {
    "build_index": "tools/build_index.py",
    "evaluate": "launch/evaluate.py",
    "extract_keys": "tools/extract_keys.py",
    "train": "launch/train.py",
    "write_targets": "tools/write_targets.py",
}
_FAKES = {
    "sbatch": 'exec bash "$@"',
    "scontrol": """
if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> "$FAKE/scontrol"; fi""",
    "srun": """
printf '%s\\n' "$*" > "$FAKE/srun"
printf '%s %s %s' "$OMP_NUM_THREADS" "${MASTER_ADDR:-}" "${MASTER_PORT:-}" > "$FAKE/environment"
[ -z "${FAKE_SECONDS:-}" ] || sleep "$FAKE_SECONDS"
[ -z "${FAKE_RESULT:-}" ] || { mkdir -p "$(dirname "$FAKE_RESULT")"; touch "$FAKE_RESULT"; }""",
}


@pytest.fixture
def slurm(tmp_path):
    """start(file, *words, **variables) gives the process of a job in a directory with the fake commands."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in _FAKES.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)

    def start(file, *words, **variables):
        given = {
            "FAKE": tmp_path,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "RUN": tmp_path / "big run",
            "BASE": "some/base",
            "SLURM_JOB_ID": 123456,
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_PER_TASK": 12,
        }
        named = {name: str(value) for name, value in {**given, **variables}.items() if value is not None}
        return subprocess.Popen(
            ["sbatch", file, *words], env=named, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )

    return start


def words_of_srun(root: Path) -> list[str]:
    """The words of srun, without its own flags and `python`."""
    words = (root / "srun").read_text()
    own, _, rest = words.partition(" python ")
    assert "--cpus-per-task=12" in own.split()
    return rest.split()


def test_every_heavy_stage_has_one():
    assert [path.stem for path in FILES] == list(FRONT_ENDS)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_job_starts_its_ranks(slurm, tmp_path, file):
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    process = slurm(file, "--seed", "3" if file.stem in ("train", "extract_keys") else "")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    front_end, *words = words_of_srun(tmp_path)
    assert front_end == FRONT_ENDS[file.stem]
    flags = {word for word in words if word.startswith("--")}
    assert flags - {"--seed"} <= flags_of(front_end)
    threads, *meeting = (tmp_path / "environment").read_text().split(" ")
    assert threads == "12"
    assert meeting == ([""] * 2 if file.stem == "extract_keys" else ["node7", str(20000 + 123456 % 20000)])


def flags_of(front_end: str) -> set[str]:
    """Those of the front-end's --help, which accepts underscores in place of hyphens too."""
    result = subprocess.run(
        [sys.executable, front_end, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    found = set(re.findall(r"--[a-z][\w-]*", result.stdout))
    return found | {flag[:2] + flag[2:].replace("-", "_") for flag in found}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_what_is_missing_is_named(slurm, tmp_path, file):
    process = slurm(file, RUN=None)
    _, said = process.communicate(timeout=30)
    assert process.returncode != 0 and "set RUN to the directory that holds" in said
    assert not (tmp_path / "srun").exists()


def test_an_unfinished_training_is_queued_again(slurm, tmp_path):
    (file,) = (path for path in FILES if path.stem == "train")
    assert slurm(file).wait(30) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 123456\n"
    (tmp_path / "scontrol").unlink()
    assert slurm(file, FAKE_RESULT=tmp_path / "big run" / "memory" / "manifest.json").wait(30) == 0
    assert not (tmp_path / "scontrol").exists()
    words = words_of_srun(tmp_path)
    assert words[words.index("--ds_config") + 1] == "ds_configs/zero2.json"  # the preset is not cut
    assert slurm(file, DS_CONFIG="ds_configs/zero3_hpz.json").wait(30) == 0
    assert "ds_configs/zero3_hpz.json" in words_of_srun(tmp_path)


@pytest.mark.parametrize("file", [path for path in FILES if path.stem != "train"], ids=lambda path: path.stem)
def test_a_stage_is_queued_again_before_its_time_is_over(slurm, tmp_path, file):
    process = slurm(file, FAKE_SECONDS=2)
    while not (tmp_path / "environment").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert (tmp_path / "scontrol").read_text() == "requeue 123456\n"


def test_targets_use_the_index_that_is_there(slurm, tmp_path):
    (file,) = (path for path in FILES if path.stem == "write_targets")
    assert slurm(file).wait(30) == 0
    assert "--index" not in words_of_srun(tmp_path)
    (tmp_path / "big run" / "index").mkdir(parents=True)
    assert slurm(file).wait(30) == 0
    assert "--index" in words_of_srun(tmp_path)
