"""The batch files for Slurm and the pipeline that submits them, with commands of Slurm that write down how
they are called. The same with Slurm itself: tests/cluster/test_slurm.py."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
_RESULTS = {
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
if [ "$CODE" = waits ]; then
    until [ -e "$FAKE/asked" ]; do sleep .05; done
    exit 143
fi
made=$(dirname "$MARK")/checkpoints/step-7
[ "$CODE" != cut ] || {{ mkdir -p "$made.tmp"; touch "$made.tmp/manifest.json" "$made.tmp/weights"; exit 0; }}
[ "$CODE" != saves ] || {{ mkdir -p "$made"; touch "$made/manifest.json"; exit 0; }}
[ "$CODE" != done ] || {{ mkdir -p "$(dirname "$MARK")"; touch "$MARK"; exit 0; }}
exit "$CODE" """,
}

Start = Callable[..., subprocess.CompletedProcess[str]]


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
            "MARK": str(self.run / _RESULTS[stage]),
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


def test_every_stage_has_a_file_and_resources() -> None:
    assert {path.stem for path in SLURM.glob("*.sbatch")} == set(ALL)
    table = re.findall(r"(?m)^resources (\w+)", (SLURM / "settings.sh").read_text())
    assert tuple(table) == ALL
    for path in SLURM.glob("*.sh*"):
        assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_the_stages_are_submitted_one_after_another_with_flags_that_they_have(cluster: Cluster) -> None:
    """The example of the settings, filled in, and all stages: their flags are read by the front-ends."""
    text = cluster.root / "text"
    text.mkdir()
    cluster.set(
        TEXT=f"({text})",
        GENERAL=f"({text})",
        TOKENIZER="train:32000",
        BASE="$RUN/base",
        STAGES=f"({' '.join(ALL)})",
    )
    result = cluster.submit(str(cluster.settings))
    assert result.returncode == 0, result.stderr
    calls = cluster.said("sbatch")
    assert [re.search(r"--job-name=(\w+)", call)[1] for call in calls] == list(ALL)
    assert "--dependency" not in calls[0]
    for number, (stage, call) in enumerate(zip(ALL[1:], calls[1:], strict=True)):
        assert f"--dependency=afterok:{101 + number} launch/slurm/{stage}.sbatch" in call
        assert "--kill-on-invalid-dep=yes" in call and "--signal=B:USR1@300" in call
    train = calls[ALL.index("train")]
    assert "--nodes=2 --ntasks-per-node=8 --cpus-per-task=8 --time=24:00:00 --gpus-per-node=8" in train
    assert "--gpus-per-node" not in calls[0] and f"--chdir={ROOT}" in train
    assert (cluster.run / "slurm" / "jobs").read_text().split() == [str(101 + n) for n in range(len(ALL))]


def test_what_the_environment_says_is_no_result_of_a_check(cluster: Cluster) -> None:
    """As `module load` and settings of others may."""
    cluster.make("corpus")
    cluster.set(ENVIRONMENT="'echo loaded python/3.12'", more="echo settings of the group")
    result = cluster.submit("--dry-run", str(cluster.settings), "extract_keys", "build_index")
    assert result.returncode == 0, result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines()] == [
        "--job-name=extract_keys",
        "--job-name=build_index",
    ]
    assert "loaded python/3.12" in result.stderr and "settings of the group" in result.stderr


def test_a_dry_run_submits_nothing_and_leaves_nothing(cluster: Cluster) -> None:
    cluster.make("corpus")
    result = cluster.submit("--dry-run", str(cluster.settings), "extract_keys")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("sbatch --job-name=extract_keys --nodes=2 ")
    assert not cluster.said("sbatch") and not (cluster.run / "slurm").exists()


WRONG = {
    "no run": ({"RUN": ""}, ["train"], "RUN is not set"),
    "no base": ({"BASE": ""}, ["extract_keys"], "BASE is not set, and extract_keys needs it"),
    "a base that is not there": ({"BASE": "/no/base"}, ["extract_keys"], "BASE: /no/base does not exist"),
    "a base that no node has": ({"BASE": "no/base"}, ["extract_keys"], "no model in the cache of the Hub"),
    "no such stage": ({}, ["trian"], "there is no stage 'trian'; the stages: build_index convert_checkpoint"),
    "no stage": ({"STAGES": "()"}, [], "STAGES is empty"),
    "a stage too early": ({}, ["write_targets", "extract_keys"], "write_targets reads .*/a run/keys"),
    "a wrong flag": (
        {"more": "flags extract_keys --codecs int8"},
        ["extract_keys"],
        "there is no flag --codecs; did you mean --codec.*these flags of extract_keys are not right",
    ),
    "a wrong value": ({"more": "flags extract_keys --dim 0"}, ["extract_keys"], "--dim must be at least 1"),
    "no text": ({"TEXT": "(/no/text)"}, ["prepare_corpus"], "TEXT: /no/text does not exist"),
    "texts not named": ({}, ["prepare_corpus"], "TEXT is not set"),
    "an output of its own": (
        {"more": "flags extract_keys --output /elsewhere"},
        ["extract_keys"],
        "flags extract_keys: leave out --output: every stage writes below RUN",
    ),
    "a stage in a wrong line": ({"more": "flags trian --k 3"}, ["train"], "there is no stage 'trian'"),
    "a short line": ({"more": "resources train 2 8"}, ["train"], "resources train 2 8: give stage, nodes"),
    "no number": ({"more": "resources train 2 x 1 0 1:00"}, ["train"], "tasks a node: 'x' is not a number"),
    "no time": ({"more": "resources train 2 8 1 0 long"}, ["train"], "time: 'long' is not"),
    "no seconds": ({"SECONDS_TO_SAVE": "soon"}, ["train"], "SECONDS_TO_SAVE: 'soon' is not a number"),
    "not bash": ({"more": "if"}, ["train"], "could not be read by bash|syntax error"),
    "no other text": ({"GENERAL": "(/no/general)"}, ["fit_gate"], "GENERAL: /no/general does not exist"),
    "no environment": ({"ENVIRONMENT": "'source /no/file'"}, ["train"], "ENVIRONMENT=.* failed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_anything_is_submitted(cluster: Cluster, name: str) -> None:
    settings, stages, message = WRONG[name]
    cluster.set(**settings)
    for name in ("corpus", "memory"):
        (cluster.run / name).mkdir(parents=True)
    result = cluster.submit(str(cluster.settings), *stages)
    assert result.returncode == 2, result
    assert re.search(message, result.stderr, re.DOTALL), result.stderr
    assert not cluster.said("sbatch") and not (cluster.run / "slurm").exists()


def test_what_slurm_refuses_leaves_no_jobs(cluster: Cluster) -> None:
    cluster.make("corpus")
    stages = ("extract_keys", "build_index", "write_targets")
    result = cluster.submit(str(cluster.settings), *stages, NOT_POSSIBLE="write_targets")
    assert result.returncode == 2 and "Slurm does not take write_targets: sbatch: error" in result.stderr
    assert not cluster.said("sbatch") and not (cluster.run / "slurm").exists()
    result = cluster.submit(str(cluster.settings), *stages, REFUSED="write_targets")
    assert result.returncode == 2 and "2 jobs before it were cancelled" in result.stderr
    assert cluster.said("scancel") == ["101 102"]


def test_a_run_is_in_the_queue_once(cluster: Cluster) -> None:
    cluster.make("corpus")
    assert cluster.submit(str(cluster.settings), "extract_keys").returncode == 0
    again = cluster.submit(str(cluster.settings), "extract_keys", QUEUE="101 extract_keys")
    assert again.returncode == 2 and "in the queue: 101 extract_keys" in again.stderr
    assert len(cluster.said("sbatch")) == 1
    assert cluster.submit(str(cluster.settings), "extract_keys").returncode == 0  # it has ended since


def test_a_stage_that_is_complete_is_submitted_only_with_other_flags(cluster: Cluster) -> None:
    cluster.make("corpus", "keys")
    assert cluster.job("extract_keys", "0 0").wait(60) == 0
    result = cluster.submit(str(cluster.settings), "extract_keys", "write_targets")
    assert "extract_keys: complete, not submitted" in result.stderr
    assert [call for call in cluster.said("sbatch") if "extract_keys" in call] == []
    cluster.set(more="flags extract_keys --dim 8")
    assert cluster.submit(str(cluster.settings), "extract_keys").returncode == 0
    assert "extract_keys.sbatch" in cluster.said("sbatch")[-1]


def test_a_job_starts_its_ranks(cluster: Cluster) -> None:
    """Connected, or apart; as many threads as cores; nothing of the launcher that submitted it."""
    cluster.make("corpus", "keys", "targets")
    process = cluster.job("train", "done 0", RANK="3", WORLD_SIZE="9", OMP_NUM_THREADS="1")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    (words,) = cluster.said("srun")
    assert words.startswith("--kill-on-bad-exit=1 --cpus-per-task=12 bash launch/slurm/rank.sh ")
    assert "python launch/train.py --ds_config ds_configs/zero2.json" in words
    given = dict(line.partition("=")[::2] for line in cluster.said("environment"))
    assert given["OMP_NUM_THREADS"] == "12" and not {"RANK", "WORLD_SIZE"} & given.keys()
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("node7", str(20000 + 123456 % 20000))
    assert given["HF_HUB_OFFLINE"] == "1" and given["NCCL_DEBUG"] == "WARN"
    (cluster.run / "keys" / "manifest.json").unlink()
    assert cluster.job("extract_keys", "done 0", MASTER_ADDR="elsewhere").wait(60) == 0
    assert cluster.said("srun")[0].startswith("--kill-on-bad-exit=0 ")
    assert not any(line.startswith("MASTER_") for line in cluster.said("environment"))


def test_targets_use_the_index_that_is_there(cluster: Cluster) -> None:
    cluster.make("corpus", "keys")
    assert cluster.job("write_targets", "done 0").wait(60) == 0
    assert "--index" not in cluster.said("srun")[0]
    cluster.make("index")
    assert cluster.job("write_targets", "done 0").wait(60) == 0
    assert f"--index {cluster.run / 'index'}" in cluster.said("srun")[0]


def test_the_gate_reads_other_text_and_is_taken_where_it_is_there(cluster: Cluster) -> None:
    cluster.make("corpus", "memory")
    for stage in ("evaluate", "convert_checkpoint"):
        assert cluster.job(stage, "done").wait(60) == 0
        assert "--gate" not in cluster.said("srun")[0]
        (cluster.run / _RESULTS[stage]).unlink()
    cluster.set(GENERAL=f"({cluster.base} '{cluster.root}/a run')")
    assert cluster.job("fit_gate", "done").wait(60) == 0
    (words,) = cluster.said("srun")
    assert words.startswith("--kill-on-bad-exit=1 ")
    assert f"--general {cluster.base} {cluster.run} --output {cluster.run / 'gate'}" in words
    for stage in ("evaluate", "convert_checkpoint"):
        assert cluster.job(stage, "done").wait(60) == 0
        assert f"--gate {cluster.run / 'gate'} --output" in cluster.said("srun")[0]


ENDS = {
    "complete": ("done 0", 0, False),
    "complete, one rank was killed": ("137 done", 0, False),
    "a training that was asked to stop": ("0 0", 0, True),
    "ranks that were sent SIGTERM": ("143 143", 0, True),
    "sent USR1 before they took it": ("138 143", 0, True),
    "a rank was killed, the other says so": ("75 137", 0, True),
    "a host was lost": ("75 gone", 0, True),
    "a host was out of reach": ("75 75", 0, True),
    "wrong input, the others were ended": ("2 143", 2, False),
    "a fault": ("143 1", 1, False),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_a_job_ends(cluster: Cluster, name: str) -> None:
    codes, expected, is_queued = ENDS[name]
    cluster.make("corpus", "keys", "targets")
    process = cluster.job("train", codes)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == expected, said
    assert cluster.said("scontrol") == (["requeue 123456"] if is_queued else [])
    assert not list((cluster.run / "slurm").glob("*.codes"))


def test_wrong_input_to_a_complete_stage_fails(cluster: Cluster) -> None:
    cluster.make("corpus", "keys", "targets", "memory")
    assert cluster.job("train", "2 2").wait(60) == 2


def test_a_job_that_was_cancelled_is_not_queued_again(cluster: Cluster) -> None:
    cluster.make("corpus", "keys", "targets")
    assert cluster.job("train", "143 143", STATE="CANCELLED").wait(60) == 143
    assert not cluster.said("scontrol")


def test_the_third_short_life_is_the_last(cluster: Cluster) -> None:
    cluster.make("corpus", "keys", "targets")
    for _ in range(2):
        assert cluster.job("train", "137 143").wait(60) == 0
    process = cluster.job("train", "137 143")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "three times in a row: not started again" in said
    assert len(cluster.said("scontrol")) == 2


def test_the_third_stop_without_anything_new_is_the_last(cluster: Cluster) -> None:
    """Ranks that end with 0, without a result, an error or progress, would go into the queue for ever; so
    would those that are killed while they save, at each start."""
    cluster.make("corpus", "keys", "targets")
    cluster.set(ENVIRONMENT="SECONDS=700")
    for codes in ("0 0", "143 143", "saves 0", "0 0", "137 143", "cut 0"):
        assert cluster.job("train", codes).wait(60) == 0
    process = cluster.job("train", "cut 0")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "three times without an error, with no new unit and no new checkpoint in between" in said
    assert f"{cluster.run}/memory/manifest.json is not there: not started again" in said
    assert len(cluster.said("scontrol")) == 6
    for codes, expected in (("0 0", 0), ("0 0", 0), ("2 143", 2), ("0 0", 0)):
        assert cluster.job("train", codes).wait(60) == expected  # submitted again, it counts from one


@pytest.mark.parametrize(("seconds_left", "counts"), [(320, True), (5000, False)])
def test_a_short_job_that_has_no_time_left_counts_and_one_that_makes_room_does_not(
    cluster: Cluster, seconds_left: int, counts: bool
) -> None:
    cluster.make("corpus")
    end = str(int(time.time()) + seconds_left)
    process = cluster.job("extract_keys", "waits", SLURM_JOB_END_TIME=end)
    ask_to_stop(cluster, process)
    assert process.wait(60) == 0
    assert (cluster.run / "slurm" / "extract_keys.idle").exists() == counts


def ask_to_stop(cluster: Cluster, process: subprocess.Popen[str]) -> None:
    """As Slurm does, once the ranks are at work."""
    deadline = time.monotonic() + 60
    while not (cluster.root / "environment").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)


def test_a_long_life_and_a_complete_stage_end_the_count_of_short_lives(cluster: Cluster) -> None:
    cluster.make("corpus", "keys", "targets")
    for seconds in (0, 700, 0, 0):
        cluster.set(ENVIRONMENT=f"SECONDS={seconds}")
        assert cluster.job("train", "137 143").wait(60) == 0
    assert cluster.job("train", "done 0").wait(60) == 0
    (cluster.run / "memory" / "manifest.json").unlink()
    assert cluster.job("train", "137 143").wait(60) == 0
    assert len(cluster.said("scontrol")) == 5


def test_before_its_time_is_over_a_job_stops_its_ranks_and_is_queued_again(cluster: Cluster) -> None:
    cluster.make("corpus")
    process = cluster.job("extract_keys", "waits")
    ask_to_stop(cluster, process)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert cluster.said("scancel") == ["--quiet --signal=TERM 123456"]
    assert cluster.said("scontrol") == ["requeue 123456"]
