"""Benchmark `evaluate` at tiny sizes: the arms agree with each other and with fp64, and the JSON holds what
is promised."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World

SIZES = {"positions": 70, "width": 12, "vocab_size": 1301, "num_lambdas": 6, "runs": 1}


@pytest.fixture
def bench() -> Any:
    return importlib.import_module("mlpmem_ds.benchmarks.evaluate")


def test_arms_agree_with_the_mixture_in_float64(bench: Any) -> None:
    problem = bench.make_problem(bench.Config(output=Path("unused"), **SIZES))
    labels = problem.labels_N.numpy()
    probabilities = []
    for hidden, weight in (
        (problem.base_hidden_ND, problem.base_weight_VD),
        (problem.memory_hidden_ND, problem.memory_weight_VD),
    ):
        logits = hidden.double().numpy() @ weight.double().numpy().T
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities.append(
            (exponentials / exponentials.sum(1, keepdims=True))[np.arange(len(labels)), labels]
        )
    base, memory = probabilities
    wanted = [
        np.exp(-np.log((1 - weight) * base + weight * memory).mean()) for weight in np.linspace(0, 1, 6)
    ]
    for arm in bench.ARMS.values():
        np.testing.assert_allclose(arm(problem), wanted, rtol=1e-6)
    assert len({round(value, 3) for value in wanted}) == 6


def test_report(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench, "in_child", lambda function, *arguments: function(*arguments)
    )  # a child costs seconds
    bench.run(bench.Config(output=tmp_path / "evaluate.json", **SIZES), World())
    report = json.loads((tmp_path / "evaluate.json").read_text())
    assert report["name"] == "evaluate" and report["settings"]["vocab_size"] == 1301
    assert {"grid_over_single", "speed_over_dense_grid", "peak_memory_over_dense_grid"} <= set(
        report["ratios"]
    )
    assert report["ratios"]["perplexity_difference"] < 1e-5
    assert all(np.isfinite(value) and value >= 0 for value in report["ratios"].values())
    metrics = {(row["arm"], row["metric"]): row["runs"] for row in report["rows"]}
    for arm in ("ours", "dense_grid", "dense_gather"):
        assert metrics[arm, "cpu_seconds"] == 1 and metrics[arm, "peak_memory_above_start"] == 1


@pytest.mark.parametrize("name", ["positions", "width", "vocab_size", "num_lambdas", "runs"])
def test_wrong_sizes(bench: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be at least [12], not 0"):
        bench.Config(output=Path("unused"), **{**SIZES, name: 0})
    with pytest.raises(UserError, match="--threads must be at least 1 and at most 1024, not -1"):
        bench.Config(output=Path("unused"), threads=-1)
