"""launch/slurm/ under Slurm itself, on two hosts: the whole pipeline, and what happens when a job is
preempted, told that its time is over, loses a rank or a node, is cancelled, or fails."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..conftest import write_text
from ..launch.slurm.conftest import ALL
from .hosts import Cluster, make_cluster
from .slurm_cluster import Slurm, start_slurm, why_not

pytestmark = pytest.mark.cluster
_SETTINGS = """
RUN={run}
BASE=$RUN/base
TEXT=({text})
TOKENIZER=train:300
DS_CONFIG=ds_configs/cpu.json
STAGES=({stages})
SBATCH_FLAGS=()
SECONDS_TO_SAVE=30
for stage in {stages}; do resources "$stage" 2 1 1 0 0:30:00; done
resources prepare_corpus 1 1 1 0 0:30:00
resources convert_checkpoint 1 1 1 0 0:30:00
flags prepare_corpus --processes 1 --block-size 32 --stride 16 --tuning-fraction .15 --test-fraction .15
flags train_base --ds-config ds_configs/cpu.json --num-layers 2 --hidden-size 32 --num-heads 2 --epochs 1
flags extract_keys --unit-positions 256
flags build_index --factory IVF8,PQ4 --num-shards 2
flags write_targets --search ivf --nprobe 4 --k 32 --shard-positions 256
flags train --num-blocks 1 --epochs 30 --batch-positions 128 --log-every-steps 1 --save-every-steps 1000
flags evaluate --speed-positions 16 --samples 1 --bootstrap-samples 100
"""
_SECONDS = 300.0  # of a stage, on a machine with other work


@pytest.fixture(scope="module")
def slurm(_namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with make_cluster(tmp_path_factory.mktemp("slurm")) as cluster, start_slurm(cluster) as slurm:
        yield slurm


def settings_of(cluster: Cluster, name: str, *stages: str, more: str = "") -> Path:
    """A file of settings for the run `name` in the shared directory."""
    text = cluster.directory / "text"
    if not text.exists():
        write_text(text, num_files=48)
    path = cluster.directory / f"{name}.sh"
    path.write_text(
        _SETTINGS.format(run=cluster.directory / name, text=text, stages=" ".join(stages or ALL)) + more
    )
    return path


@pytest.fixture(scope="module")
def finished(slurm: Slurm) -> Path:
    """The run directory of the whole pipeline."""
    settings = settings_of(slurm.cluster, "whole")
    submit(slurm, settings)
    slurm.wait_for("convert_checkpoint", "COMPLETED", timeout=len(ALL) * _SECONDS)
    return slurm.cluster.directory / "whole"


def submit(slurm: Slurm, settings: Path, *words: str) -> None:
    code, said = slurm.run("bash", "launch/slurm/pipeline.sh", str(settings), *words)
    assert code == 0, said


@pytest.fixture
def copy(slurm: Slurm, finished: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """copy(*directories): a run with these directories of the finished one."""
    run = slurm.cluster.directory / request.node.name

    def make(*names: str) -> Path:
        for name in names:
            shutil.copytree(finished / name, run / name)
        return run

    return make


def log_of(run: Path, stage: str) -> str:
    return "".join(path.read_text(errors="replace") for path in run.glob(f"slurm/{stage}-*.log"))


def resumes(log: str) -> bool:
    return re.search("resuming from .*step-0*[1-9]", log) is not None


def is_training(run: Path) -> bool:
    metrics = run / "memory" / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count('"loss"') > 2


def weights_of(run: Path) -> bytes:
    (path,) = (run / "memory" / "weights").glob("*.safetensors")
    return path.read_bytes()


def test_the_whole_pipeline_ends_in_a_model(slurm: Slurm, finished: Path) -> None:
    assert {slurm.states()[stage] for stage in ALL} == {"COMPLETED"}
    for stage in ALL:
        log = log_of(finished, stage)
        assert "complete, " in log and "start 1, on node" in log, log
    assert "on node[1-2]" in log_of(finished, "train")
    code, said = slurm.run("python", "tools/inspect_run.py", str(finished))
    assert code == 0, said
    export = ["launch/generate.py", "--model", str(finished / "export"), "--prompt", "alpha"]
    code, said = slurm.run("python", *export, "--max-new-tokens", "4")
    assert code == 0, said


def test_a_complete_run_is_not_submitted_again(slurm: Slurm, finished: Path) -> None:
    before = slurm.job("convert_checkpoint")
    code, said = slurm.run("bash", "launch/slurm/pipeline.sh", str(finished.with_suffix(".sh")))
    assert code == 0 and "every stage is complete" in said
    assert slurm.job("convert_checkpoint") == before


def test_a_preempted_training_goes_on_as_if_nothing_had_been(
    slurm: Slurm, finished: Path, copy: Callable[..., Path]
) -> None:
    """Another job takes the nodes: the training saves, waits, continues, and gives the same weights."""
    run = copy("corpus", "base", "keys", "targets")
    submit(slurm, settings_of(slurm.cluster, run.name, "train"))
    slurm.wait_until(lambda: is_training(run), timeout=_SECONDS)
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--job-name=urgent", "--output=/dev/null"]
    code, said = slurm.run("sbatch", *urgent, "--wrap=sleep 3")
    assert code == 0, said
    slurm.wait_for("urgent", "COMPLETED", timeout=_SECONDS)
    slurm.wait_for("train", "COMPLETED", timeout=_SECONDS)
    log = log_of(run, "train")
    assert "start 2, on node[1-2]" in log and "continues" in log and resumes(log), log
    assert weights_of(run) == weights_of(finished)


def test_a_job_whose_time_is_over_goes_back_into_the_queue(slurm: Slurm, copy: Callable[..., Path]) -> None:
    """The signal that Slurm sends before the end of the time, sent at once."""
    run = copy("corpus", "base", "keys", "targets")
    submit(slurm, settings_of(slurm.cluster, run.name, "train"))
    slurm.wait_until(lambda: is_training(run), timeout=_SECONDS)
    slurm.run("scancel", "--batch", "--signal=USR1", slurm.job("train"))
    slurm.wait_for("train", "COMPLETED", timeout=_SECONDS)
    log = log_of(run, "train")
    assert "stopped before it was complete; its job goes back into the queue" in log, log
    assert resumes(log)


def test_a_killed_rank_costs_a_start(slurm: Slurm, copy: Callable[..., Path]) -> None:
    run = copy("corpus", "base", "keys", "targets")
    submit(
        slurm, settings_of(slurm.cluster, run.name, "train", more="flags train --num-blocks 1 --epochs 9\n")
    )
    slurm.wait_until(lambda: (run / "memory" / "metrics.jsonl").exists(), timeout=_SECONDS)
    rank = next(
        process for process in slurm.cluster.hosts[1].processes() if "launch/train.py" in process.words[1:2]
    )
    rank.kill()
    slurm.wait_for("train", "COMPLETED", timeout=_SECONDS)
    log = log_of(run, "train")
    assert "ended with code 137" in log and "start 2, on node" in log, log


def test_a_lost_node_costs_a_start(slurm: Slurm, copy: Callable[..., Path]) -> None:
    run = copy("corpus", "base", "keys", "targets")
    submit(slurm, settings_of(slurm.cluster, run.name, "train"))
    slurm.wait_until(lambda: is_training(run), timeout=_SECONDS)
    lost = slurm.cluster.hosts[1]
    lost.power_off()
    slurm.wait_for("train", "PENDING", timeout=_SECONDS)
    lost.power_on()
    slurm.start_node(lost)
    slurm.wait_for("train", "COMPLETED", timeout=_SECONDS)
    assert "start 2, on node[1-2]" in log_of(run, "train")


def test_where_a_stage_fails_those_after_it_never_start(slurm: Slurm, copy: Callable[..., Path]) -> None:
    """The files of the keys are missing."""
    run = copy("corpus", "base", "keys")
    for path in (run / "keys").glob("*.npy"):
        path.unlink()
    submit(slurm, settings_of(slurm.cluster, run.name, "build_index", "write_targets", "train"))
    slurm.wait_for("build_index", "FAILED", timeout=_SECONDS)
    slurm.wait_for("write_targets", "CANCELLED")
    slurm.wait_for("train", "CANCELLED")
    log = log_of(run, "build_index")
    assert "error: " in log and "build_index: failed, code 2" in log and "start 2" not in log, log
    assert not log_of(run, "write_targets") and not log_of(run, "train")
    assert not (run / "targets").exists()


def test_a_cancelled_job_stays_so(slurm: Slurm, copy: Callable[..., Path]) -> None:
    run = copy("corpus", "base", "keys", "targets")
    submit(slurm, settings_of(slurm.cluster, run.name, "train", "evaluate"))
    slurm.wait_until(lambda: is_training(run), timeout=_SECONDS)
    slurm.run("scancel", slurm.job("train"))
    slurm.wait_for("train", "CANCELLED")
    slurm.wait_for("evaluate", "CANCELLED")
    slurm.wait_until(lambda: slurm.run("squeue", "--noheader", "--states=COMPLETING,RUNNING,PENDING")[1], "")
    assert slurm.states()["train"] == "CANCELLED"


def test_slurm_itself_refuses_before_anything_is_submitted(slurm: Slurm, copy: Callable[..., Path]) -> None:
    run = copy("corpus", "base")
    more = "SBATCH_FLAGS=(--partition=none)\n"
    settings = settings_of(slurm.cluster, run.name, "extract_keys", more=more)
    code, said = slurm.run("bash", "launch/slurm/pipeline.sh", str(settings))
    assert code == 2 and "Slurm does not take extract_keys: " in said and "none" in said, said
    assert not (run / "slurm").exists()
