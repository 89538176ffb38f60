"""The batch files of the stages: how a job starts its ranks, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from .conftest import RESULTS, Cluster


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
        (cluster.run / RESULTS[stage]).unlink()
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


@pytest.mark.parametrize("codes", ["137 137", "143 143", "137 0", "gone gone"])
def test_a_result_from_before_is_not_that_of_ranks_that_were_stopped(cluster: Cluster, codes: str) -> None:
    """It may be of other flags: of another --gate, say."""
    cluster.make("corpus", "memory", "report")
    process = cluster.job("evaluate", codes)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "complete, " not in said, said
    assert cluster.said("scontrol") == ["requeue 123456"]


def test_a_stage_that_was_complete_before_has_nothing_to_do(cluster: Cluster) -> None:
    cluster.make("corpus", "keys", "targets", "memory")
    assert cluster.job("train", "0 0").wait(60) == 0
    assert not cluster.said("scontrol")


def test_a_training_that_was_asked_to_stop_may_have_more_to_do_than_the_result_from_before(
    cluster: Cluster,
) -> None:
    cluster.make("corpus", "keys", "targets", "memory")
    process = cluster.job("train", "waits-and-saves")
    ask_to_stop(cluster, process)
    assert process.wait(60) == 0
    assert cluster.said("scontrol") == ["requeue 123456"]


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
    assert f"did not make {cluster.run}/memory/manifest.json: not started again" in said
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
