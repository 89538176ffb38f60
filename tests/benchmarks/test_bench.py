"""tools/bench.py at tiny sizes: the arms of a comparison compute the same thing, and the JSON holds what
DESIGN promises."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import UserError

ROOT = Path(__file__).parents[2]
ROW = {"arm", "metric", "unit", "median", "min", "max", "runs"}
LOSS = {
    "rows": 37,
    "width": 24,
    "vocab_size": 301,
    "entries": 7,
    "chunk_bytes": 4 * 301 * 5,
    "torch_chunk_rows": 16,
}


@pytest.fixture
def tools() -> Any:
    """Import a module when a test needs it, as the front-end does."""
    return importlib.import_module


def flags(sizes: dict[str, Any], **others: Any) -> list[str]:
    return [
        word
        for name, value in (sizes | others).items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def run_bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench.py"), *words],
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_report(path: Path, name: str, *, arms: set[str], runs: int, ratios: set[str]) -> dict[str, Any]:
    report = json.loads(path.read_text())
    assert {"name", "date", "machine", "versions", "rows", "ratios"} <= set(report)
    assert report["name"] == name
    assert {"cores", "processor", "torch_threads", "load_average_before", "load_average_after"} <= set(
        report["machine"]
    )
    assert report["versions"]["torch"] == torch.__version__
    assert all(set(row) == ROW and row["min"] <= row["median"] <= row["max"] for row in report["rows"])
    for metric in ("wall_seconds", "cpu_seconds"):
        assert {
            row["arm"]: row["runs"] for row in report["rows"] if row["metric"] == metric
        } == dict.fromkeys(arms, runs)
    assert ratios <= set(report["ratios"])
    assert all(np.isfinite(value) and value >= 0 for value in report["ratios"].values())
    return report


def test_loss_report(tmp_path: Path, tools: Any) -> None:
    output = tmp_path / "loss.json"
    done = run_bench("loss", *flags(LOSS, output=output, runs=2))
    assert done.returncode == 0, done.stderr
    report = check_report(
        output,
        "loss",
        arms=set(tools("mlpmem_ds.benchmarks.loss").timed_arms()),
        runs=2,
        ratios={"cpu_time_over_dense", "peak_memory_over_dense", "cpu_time_over_torch_lce"},
    )
    assert report["settings"]["vocab_size"] == 301
    assert report["ratios"]["gradient_difference"] < 1e-5
    assert {row["arm"] for row in report["rows"] if row["metric"] == "peak_memory_above_start"} == {
        "ours",
        "dense",
        "torch_lce",
        "torch_lce_plus_bag",
    }


def test_loss_arms_agree(tools: Any) -> None:
    loss = tools("mlpmem_ds.benchmarks.loss")
    config = loss.Config(output=Path("unused"), alpha=0.3, **LOSS)
    problem = loss.make_problem(config)
    expected = loss.dense(problem, config)
    for arm in ("ours", "torch_lce_plus_bag"):
        for found, wanted in zip(loss.ARMS[arm](problem, config), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # The hard label alone is another loss, and the one that alpha = 0 leaves.
    hard = loss.torch_lce(problem, config)
    assert abs(hard[0] - expected[0]) > 0.01 * expected[0]
    plain_ce = loss.Config(output=Path("unused"), **{**LOSS, "alpha": 0.0})
    for found, wanted in zip(hard, loss.ours(loss.make_problem(plain_ce), plain_ce), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_peak_memory_counts_what_is_held_and_nothing_before(tools: Any) -> None:
    common = tools("mlpmem_ds.benchmarks.common")
    before = np.ones(8 << 20)
    peak = common.peak_bytes_above_start(lambda: np.ones(4 << 20).sum())
    assert 31 << 20 <= peak < 40 << 20  # the kernel counts in batches of pages
    assert common.peak_bytes_above_start(lambda: None) < 4 << 20
    del before


def test_interleave_alternates(tools: Any) -> None:
    common = tools("mlpmem_ds.benchmarks.common")
    calls: list[str] = []
    timings = common.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in timings.values()] == [3, 3]
    assert common.row_of("a", "m", "s", [3.0, 1.0, 2.0]) == common.Row(
        arm="a", metric="m", unit="s", median=2.0, min=1.0, max=3.0, runs=3
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss", "--output", "absent/loss.json"], "absent does not exist"),
        (["loss", "--output", "loss.json", "--rows", "0"], "--rows must be at least 1, not 0"),
        (["loss", "--output", "loss.json", "--vocab-size", "20"], "--entries 64 distinct ids do not fit"),
        (
            ["loss", "--output", "loss.json", "--alpha", "2"],
            "--alpha must be at least 0 and at most 1, not 2.0",
        ),
        (["targets", "--output", "targets.json", "--index", "index"], "--index is of --keys: add that"),
        (
            ["targets", "--output", "targets.json", "--soft-perplexity", "2000"],
            "--soft-perplexity 2000 must lie",
        ),
    ],
)
def test_wrong_flags(
    words: list[str],
    said: str,
    tools: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tools("mlpmem_ds.benchmarks.bench").main(words) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_names_what_exists(tools: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench = tools("mlpmem_ds.benchmarks.bench")
    for words in ([], ["nothing"]):
        with pytest.raises(SystemExit) as stopped:
            bench.main(words)
        assert stopped.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said and importlib.util.find_spec(bench.module_of(name)) for name in bench.NAMES)


def test_output_directory_is_refused(tools: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory: name a file"):
        tools("mlpmem_ds.benchmarks.common").check_output(tmp_path)
