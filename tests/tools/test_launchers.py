"""The offline tools under each launcher: the same bytes as from one process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.core.log import read_events
from mlpmem_ds.stages.keys import extract_keys

from ..launcher_environment import environment_without_launchers

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def result_of(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }


def flags(base_dir: Path, corpus_dir: Path, output: Path) -> list[str]:
    """Those of the fixture `keys_dir`."""
    paths = ["--model", base_dir, "--corpus", corpus_dir, "--output", output]
    return [*map(str, paths), "--unit-positions", "256", "--device", "cpu"]


def started_ranks(output: Path) -> set[tuple[int, int]]:
    return {
        (event["rank"], event["world"])
        for event in read_events(output / "log.jsonl")
        if event["event"] == "started"
    }


@pytest.mark.parametrize(
    "launcher",
    [
        ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
        ["torchrun", "--standalone", "--nproc-per-node", "2"],
    ],
    ids=lambda words: words[0],
)
def test_real_launchers(
    launcher: list[str], base_dir: Path, corpus_dir: Path, keys_dir: Path, tmp_path: Path
) -> None:
    tool = BIN / launcher[0]
    if not tool.is_file():
        pytest.skip(f"{launcher[0]} is not installed")
    done = subprocess.run(
        [str(tool), *launcher[1:], "tools/extract_keys.py", *flags(base_dir, corpus_dir, tmp_path / "out")],
        cwd=ROOT,
        env=environment_without_launchers() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert started_ranks(tmp_path / "out") == {(0, 2), (1, 2)}
    assert result_of(tmp_path / "out") == result_of(keys_dir)


VARIABLES = {
    "srun": {
        "SLURM_PROCID": "{rank}",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_LOCALID": "{rank}",
        "SLURM_NTASKS": "3",
    },
    "deepspeed": {"RANK": "{rank}", "WORLD_SIZE": "3", "LOCAL_RANK": "{rank}", "MASTER_ADDR": "localhost"},
    "mpich": {"PMI_RANK": "{rank}", "PMI_SIZE": "3", "MPI_LOCALRANKID": "{rank}"},
}


@pytest.mark.parametrize("launcher", VARIABLES)
def test_launchers_known_by_their_variables(
    launcher: str,
    base_dir: Path,
    corpus_dir: Path,
    keys_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for rank in (2, 0, 1):
        for name, value in VARIABLES[launcher].items():
            monkeypatch.setenv(name, value.format(rank=rank))
        # One rank after the other: there are no others to connect with.
        words = [*flags(base_dir, corpus_dir, tmp_path / "out"), "--exchange", "none"]
        if launcher == "deepspeed":
            words.append(f"--local_rank={rank}")
        assert run_front_end(extract_keys.Config, extract_keys.run, argv=words) == 0
    assert started_ranks(tmp_path / "out") == {(0, 3), (1, 3), (2, 3)}
    assert result_of(tmp_path / "out") == result_of(keys_dir)
