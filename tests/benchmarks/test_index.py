"""tools/bench.py index and plan at tiny sizes: the arms find the same neighbours, and the JSON holds what is
promised."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World

SIZES = {
    "positions": 1500,
    "dim": 16,
    "vocab_size": 120,
    "factory": "IVF16,PQ4x4",
    "k": 40,
    "nprobe": 4,
    "queries": 200,
    "exact_keys": 600,
    "exact_queries": 100,
    "perplexity": 12.0,
    "sample": 50,
    "gpu_keys": 1500,
    "gpu_exact_keys": 300,
    "gpu_exact_dim": 24,
    "gpu_queries": 60,
    "runs": 2,
}


@pytest.fixture
def tools() -> Any:
    """Import a module when a test needs it, as the front-end does."""
    return importlib.import_module


def test_index_report(tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = tools("mlpmem_ds.benchmarks.index")
    output = tmp_path / "index.json"
    bench.run(bench.Config(output=output, **SIZES), World())
    report = json.loads(output.read_text())
    wanted = {
        "exact_seconds_1e5",
        "ivf_queries_per_second",
        "speed_over_big_batch_search",
        "speed_over_faiss_search",
    }
    assert report["name"] == "index" and wanted | {"tv", "build_seconds"} <= set(report["ratios"])
    assert all(np.isfinite(value) and value > 0 for value in report["ratios"].values())
    arms = {"exact", "ivf", "faiss_search", "faiss_big_batch"}
    assert {
        row["arm"] for row in report["rows"] if row["metric"] == "wall_seconds" and row["runs"] == 2
    } == arms
    assert {row["arm"] for row in report["rows"] if row["metric"] == "peak_memory_above_start"} == arms
    (seconds,) = [row for row in report["rows"] if row["metric"] == "seconds_1e5"]
    (wall,) = [row for row in report["rows"] if (row["arm"], row["metric"]) == ("exact", "wall_seconds")]
    assert seconds["median"] == pytest.approx(wall["median"] * (1e5 / 100) * (1e5 / 600))
    assert not capsys.readouterr().out  # faiss prints a line a list


def test_index_arms_find_the_same_neighbours(tools: Any) -> None:
    bench = tools("mlpmem_ds.benchmarks.index")
    config = bench.Config(output=Path("unused"), **SIZES)
    problem = bench.make_problem(config)
    expected = bench.without_self(*bench.ivf(config, problem), problem.queries_Q, config.k)
    assert (expected.ids_QK >= 0).mean() > 0.9 and not (expected.ids_QK == problem.queries_Q[:, None]).any()
    for arm in (bench.faiss_search, bench.faiss_big_batch):
        distances, ids = arm(config, problem)
        found = bench.without_self(distances, ids, problem.queries_Q, config.k)
        np.testing.assert_array_equal(found.distances_QK, expected.distances_QK)
        assert (found.ids_QK == expected.ids_QK).mean() > 0.95  # ties beyond the last are faiss's choice
    nearest = np.concatenate([found.ids_QK for found in bench.exact(config, problem)])
    assert nearest.shape == (100, 40) and nearest.max() < 600


def test_more_probes_vary_less(tools: Any) -> None:
    bench = tools("mlpmem_ds.benchmarks.index")
    variations = []
    for nprobe in (1, 16):
        config = bench.Config(output=Path("unused"), **{**SIZES, "nprobe": nprobe})
        problem = bench.make_problem(config)
        rows = bench._fidelity(config, problem, {"ivf": lambda c=config, p=problem: bench.ivf(c, p)})
        variations.append(bench.median_of(rows, "ivf", "tv"))
        assert nprobe == 1 or bench.median_of(rows, "ivf", "recall_at_k") == 1
    assert variations[0] > 0.02 and variations[1] == pytest.approx(0, abs=1e-9)


def test_gpu_arms_on_the_cpu(tools: Any) -> None:
    bench = tools("mlpmem_ds.benchmarks.index")
    rows = bench.gpu_rows(bench.Config(output=Path("unused"), **SIZES), torch.device("cpu"))
    assert {(row.arm, row.metric) for row in rows} == {
        (arm, metric)
        for arm in ("gpu_exact", "gpu_ivf")
        for metric in ("queries", "seconds_of_all_keys", "share_of_peak")
    }
    assert all(row.median > 0 for row in rows)


def test_plan_report(tools: Any, tmp_path: Path) -> None:
    bench = tools("mlpmem_ds.benchmarks.plan")
    output = tmp_path / "plan.json"
    config = bench.Config(
        output=output, positions=1200, dim=16, vocab_size=120, k=40, neighbour_perplexity=12.0, threads=1
    )
    bench.run(config, World())
    report = json.loads(output.read_text())
    assert all(0 < report["ratios"][f"checksum_share_{stage}"] < 1 for stage in ("index", "targets"))
    assert report["name"] == "plan" and {"bytes_error", "memory_error", "time_error"} <= set(report["ratios"])
    assert all(np.isfinite(value) for value in report["ratios"].values())
    assert report["ratios"]["bytes_error_index"] < 0.1 and report["ratios"]["memory_error_index"] < 0.5
    measured = {row["metric"]: row["median"] for row in report["rows"] if row["arm"] == "measured"}
    assert 5e7 < measured["targets_peak_memory"] < 5e9 and measured["keys_bytes"] > 2400 * (16 + 2 + 4)
    assert not [path for path in tmp_path.iterdir() if path != output]


def test_mistakes_name_the_flags(tools: Any, tmp_path: Path) -> None:
    bench = tools("mlpmem_ds.benchmarks.index")
    for changes, words in (
        ({"queries": 5000}, "--queries 5000 and --positions 1500 must ascend"),
        ({"exact_keys": 50}, "--exact-queries 100, --exact-keys 50"),
        ({"perplexity": 50.0}, "--perplexity 50 must lie between 1 and --k 40"),
        ({"runs": 0}, "--runs must be at least 1, not 0"),
    ):
        with pytest.raises(UserError, match=words):
            bench.Config(output=tmp_path / "x", **{**SIZES, **changes})
    plan = tools("mlpmem_ds.benchmarks.plan")
    with pytest.raises(UserError, match="--positions must be at least 1, not 0"):
        plan.Config(output=tmp_path / "x", positions=0)
    with pytest.raises(UserError, match="write_targets failed.*--k must be at least 1"):
        plan.told_by_front_end("write_targets", "--keys", tmp_path, "--output", tmp_path / "y", "--k", 0)


def test_keys_that_do_not_suffice_are_refused(tools: Any, tmp_path: Path, keys_dir: Path) -> None:
    for name, words in (
        ("index", "--positions up to their number"),
        ("plan", "--positions up to half of them"),
    ):
        bench = tools(f"mlpmem_ds.benchmarks.{name}")
        sizes = {"positions": 10**6} if name == "plan" else {}
        with pytest.raises(UserError, match=words):
            bench.run(bench.Config(output=tmp_path / "x.json", keys=keys_dir, **sizes), World())
    assert not list(tmp_path.iterdir())
