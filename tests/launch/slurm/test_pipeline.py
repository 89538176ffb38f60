"""The pipeline that submits the stages as Slurm jobs, and the settings that it reads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import ALL, ROOT, SLURM, Cluster


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


@pytest.mark.parametrize("kind", ["through a link", "relative", "with a slash"])
def test_a_base_of_this_run_is_found_however_its_path_is_written(cluster: Cluster, kind: str) -> None:
    cluster.make("corpus")
    link = cluster.root / "link"
    link.symlink_to(cluster.root)
    relative = os.path.relpath(cluster.run, ROOT)
    run = {"through a link": f"'{link}/a run'", "relative": f"'{relative}'"}.get(kind, f"'{cluster.run}'")
    cluster.set(RUN=run, BASE='"$RUN/base/"' if kind == "with a slash" else '"$RUN/base"')
    result = cluster.submit("--dry-run", str(cluster.settings), "train_base", "extract_keys")
    assert result.returncode == 0 and result.stdout.count("--job-name") == 2, result.stderr


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


def settings_of_a_first_run(cluster: Cluster, run: Path) -> None:
    """They need nothing that is there in the run."""
    text = cluster.root / "text"
    text.mkdir()
    cluster.set(RUN=f"'{run}'", TEXT=f"({text})", TOKENIZER="train:300")


@pytest.mark.parametrize("run", [".", "run", "new/run"])
def test_a_dry_run_leaves_the_folders_as_they_were(cluster: Cluster, run: str) -> None:
    scratch = cluster.root / "scratch" / "alice"
    scratch.mkdir(parents=True)
    settings_of_a_first_run(cluster, scratch / run)
    result = cluster.submit("--dry-run", str(cluster.settings), "prepare_corpus")
    assert result.returncode == 0 and "--job-name=prepare_corpus" in result.stdout, result.stderr
    assert scratch.is_dir() and not list(scratch.iterdir())


def test_what_slurm_refuses_is_said_where_the_run_cannot_be_removed(cluster: Cluster) -> None:
    plain_user = ("unshare", "--user", "--map-user=54321")  # root may remove it
    if (
        shutil.which("unshare") is None
        or subprocess.run([*plain_user, "true"], stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip("no user namespaces here")
    run = cluster.root / "scratch" / "alice"
    run.mkdir(parents=True)
    settings_of_a_first_run(cluster, run)
    run.parent.chmod(0o555)
    result = subprocess.run(
        [*plain_user, "bash", SLURM / "pipeline.sh", cluster.settings, "prepare_corpus"],
        env=cluster.environment(NOT_POSSIBLE="prepare_corpus"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2 and "invalid partition" in result.stderr, result.stderr
    assert run.is_dir() and not list(run.iterdir())


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
    "no text from here": ({"TEXT": "(no_text)"}, ["prepare_corpus"], "TEXT: no_text does not exist"),
    "a text among others": (
        {"TEXT": "(docs:torch datasets:a/b 'launch/*.py' no_text)"},
        ["prepare_corpus"],
        "TEXT: no_text does not exist",
    ),
    "a mistyped configuration": (
        {"DS_CONFIG": "ds_configs/zero_2.json"},
        ["train"],
        "DS_CONFIG: ds_configs/zero_2.json does not exist",
    ),
    "no other text from here": ({"GENERAL": "(runs/no)"}, ["fit_gate"], "GENERAL: runs/no does not exist"),
    "no other text at all": (
        {"GENERAL": "(s3://bucket/general 'runs/no')"},
        ["fit_gate"],
        "GENERAL: runs/no does not exist",
    ),
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


def test_a_stage_is_complete_for_the_flags_that_made_its_result(cluster: Cluster) -> None:
    cluster.make("corpus", "keys")
    assert cluster.job("extract_keys", "0 0").wait(60) == 0
    cluster.set(more="flags extract_keys --dim 8")
    assert cluster.job("extract_keys", "2 2").wait(60) == 2
    for settings in ("flags extract_keys --dim 8", ""):
        cluster.set(more=settings)
        result = cluster.submit("--dry-run", str(cluster.settings), "extract_keys")
        assert "--job-name=extract_keys" in result.stdout, result.stderr
    assert cluster.job("extract_keys", "0 0").wait(60) == 0
    assert "every stage is complete" in cluster.submit(str(cluster.settings), "extract_keys").stderr
