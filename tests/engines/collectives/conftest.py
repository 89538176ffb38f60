"""Ranks as processes."""

import pickle
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ...launcher_environment import environment_without_launchers

ROOT = Path(__file__).parents[3]
PROGRAM = Path(__file__).with_name("rank_program.py")

RunRanks = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run_ranks(tmp_path: Path, forked_commands: Path) -> RunRanks:
    """`run_ranks(how, size, scenario)` gives what each rank left, {} where it left nothing."""

    def run(how: str, size: int, scenario: str, *, launcher: list[str] = [], code: int = 0) -> list[dict]:  # noqa: B006
        words = [*launcher, forked_commands / "python", str(PROGRAM), how, str(size), scenario, str(tmp_path)]
        environment = environment_without_launchers()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if not launcher:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        results = [tmp_path / f"result-{rank}" for rank in range(size)]
        return [pickle.loads(path.read_bytes()) if path.exists() else {} for path in results]

    return run


@pytest.fixture
def check_everything() -> Callable[[list[dict[str, Any]]], None]:
    return _check_everything


def _check_everything(results: list[dict[str, Any]]) -> None:
    """Of the scenario `everything` of rank_program.py."""
    size = len(results)
    factor = size * (size + 1) // 2
    for rank, result in enumerate(results):
        assert np.array_equal(result["sum"], np.arange(100).reshape(4, 25) * factor)
        assert result["sum"].dtype == np.int64 and result["small sum"] == np.array([size])
        assert result["no sum"].shape == (0, 3)
        assert [value["rank"] for value in result["values"]] == list(range(size))
        assert all(np.array_equal(value["many"], np.arange(50 * value["rank"])) for value in result["values"])
        for source, part in enumerate(result["parts"]):
            assert part.shape == (rank, 1 + source) and part.dtype == np.int16
            assert (part == 10 * source + rank).all()
        assert [(one.shape, float(one)) for one in result["floats"]] == [
            ((), source) for source in range(size)
        ]
        assert result["numbers"] == sorted(result["numbers"]) and result["other"]
        assert not result["left"], "the shared folder is taken away"
    assert sorted(number for result in results for number in result["numbers"]) == list(range(20 * size))
