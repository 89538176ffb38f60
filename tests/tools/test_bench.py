"""tools/bench.py at tiny sizes: the arms of a comparison compute the same thing, and the JSON holds what DESIGN promises."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.targets import open_targets

TOOLS = Path(__file__).parents[2] / "tools"
ROW = {"arm", "metric", "unit", "median", "min", "max", "runs"}
LOSS = {"rows": 37, "width": 24, "vocab_size": 301, "entries": 7, "chunk_bytes": 4 * 301 * 5, "torch_chunk_rows": 16}
TARGETS = {
    "positions": 1500,
    "dim": 16,
    "vocab_size": 120,
    "k": 40,
    "nprobe": 3,
    "soft_perplexity": 20.0,
    "sharp_perplexity": 5.0,
    "sample": 100,
    "plain_batch": 130,
    "mass": 1.0,
}


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module as the front-end does, from beside it."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


def flags(sizes: dict[str, Any], **others: Any) -> list[str]:
    return [word for name, value in (sizes | others).items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run_bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / "bench.py"), *words], capture_output=True, text=True, timeout=300
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
        assert {row["arm"]: row["runs"] for row in report["rows"] if row["metric"] == metric} == dict.fromkeys(
            arms, runs
        )
    assert ratios <= set(report["ratios"])
    assert all(np.isfinite(value) and value >= 0 for value in report["ratios"].values())
    return report


def test_loss_report(tmp_path: Path) -> None:
    output = tmp_path / "loss.json"
    done = run_bench("loss", *flags(LOSS, output=output, runs=2))
    assert done.returncode == 0, done.stderr
    report = check_report(
        output,
        "loss",
        arms={"ours", "dense", "torch_lce", "torch_lce_plus_bag"},
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
    loss = tools("benchmarks.loss")
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
    common = tools("benchmarks.common")
    before = np.ones(8 << 20)
    peak = common.peak_bytes_above_start(lambda: np.ones(4 << 20).sum())
    assert 31 << 20 <= peak < 40 << 20  # the kernel counts in batches of pages
    assert common.peak_bytes_above_start(lambda: None) < 4 << 20
    del before


def test_interleave_alternates(tools: Any) -> None:
    common = tools("benchmarks.common")
    calls: list[str] = []
    timings = common.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in timings.values()] == [3, 3]
    assert common.row_of("a", "m", "s", [3.0, 1.0, 2.0]) == common.Row(
        arm="a", metric="m", unit="s", median=2.0, min=1.0, max=3.0, runs=3
    )


def test_targets_report(tmp_path: Path) -> None:
    output = tmp_path / "targets.json"
    sizes = TARGETS | {"mass": 0.99, "nprobe": 8, "plain_positions": 400}
    done = run_bench("targets", *flags(sizes, output=output, runs=2, factory="IVF8,PQ4x4"))
    assert done.returncode == 0, done.stderr
    report = check_report(
        output,
        "targets",
        arms={"ours", "plain"},
        runs=2,
        ratios={"speed_over_plain", "bytes_per_token_sharp", "bytes_per_token_soft", "tv", "tv_published_recipe"},
    )
    # All lists probed: ours is exact but for the mass it drops and float16; half a byte for four numbers is not.
    assert report["ratios"]["tv"] < 0.01
    assert report["ratios"]["tv_sharp"] < 0.01
    assert report["ratios"]["tv_published_recipe"] > 0.02
    assert report["ratios"]["bytes_per_token_sharp"] != report["ratios"]["bytes_per_token_soft"]
    widths = {row["metric"]: row["median"] for row in report["rows"] if row["arm"] == "ours"}
    assert 1 < widths["entries_per_token_sharp"] < widths["entries_per_token_soft"] <= 40
    assert [path.name for path in tmp_path.iterdir()] == ["targets.json"]


def test_targets_arms_agree_where_the_index_holds_whole_vectors(tools: Any, tmp_path: Path) -> None:
    targets = tools("benchmarks.targets")
    config = targets.Config(output=tmp_path / "unused", factory="IVF8,Flat", **TARGETS)
    setting = targets.prepare(config, tmp_path, World())
    exact = targets.exact_neighbours_of_sample(setting)
    temperature = float(np.median(exact.squared_QK)) / 5
    targets.ours(setting, temperature, tmp_path / "ours", World())
    targets.plain(setting, temperature, tmp_path / "plain.bin")
    ours = open_targets(tmp_path / "ours").read_all()
    codes_ND = setting.keys.read("keys")
    twins = {
        bytes(codes) for codes, count in zip(*np.unique(codes_ND, axis=0, return_counts=True), strict=True) if count > 1
    }
    rows_of_plain = list(targets.read_plain(tmp_path / "plain.bin"))
    assert len(rows_of_plain) == config.positions
    for position, (ids, probabilities) in enumerate(rows_of_plain):
        if bytes(codes_ND[position]) in twins:
            continue  # the first hit may be the twin
        place = slice(int(ours.offsets[position]), int(ours.offsets[position + 1]))
        dense_of_ours, dense_of_plain = np.zeros((2, config.vocab_size))
        dense_of_ours[ours.ids[place]] = ours.probabilities[place]
        dense_of_plain[ids] = probabilities
        # float16 on both sides, and a tie at the k-th neighbour may go either way
        assert np.abs(dense_of_ours - dense_of_plain).sum() / 2 < 5e-3


def test_exact_sample_is_brute_force(tools: Any, tmp_path: Path) -> None:
    targets = tools("benchmarks.targets")
    config = targets.Config(output=tmp_path / "unused", **(TARGETS | {"positions": 300}))
    targets.write_synthetic_keys(tmp_path / "keys", config, World())
    keys = targets.open_keys(tmp_path / "keys")
    exact = targets.exact_neighbours_of_sample(targets.Setting(keys=keys, index=tmp_path, config=config))
    codes_ND, values_N = keys.read("keys").astype(np.int64), keys.read("values")
    for position, squared_K, values_K in zip(exact.positions_Q, exact.squared_QK, exact.values_QK, strict=True):
        others = [int(n) for n in range(len(codes_ND)) if n != position]
        distances = {n: int(((codes_ND[n] - codes_ND[position]) ** 2).sum()) for n in others}
        nearest = sorted(others, key=lambda n: (distances[n], n))[: config.k]
        assert squared_K.tolist() == [distances[n] * keys.scale**2 for n in nearest]
        assert values_K.tolist() == [int(values_N[n]) for n in nearest]


def test_synthetic_keys_are_repeatable_and_clustered(tools: Any) -> None:
    targets = tools("benchmarks.targets")
    codes_ND, values_N = targets.synthetic_keys(400, 16, 90)
    again_ND, again_N = targets.synthetic_keys(400, 16, 90)
    assert codes_ND.dtype == np.int8 and (codes_ND == again_ND).all() and (values_N == again_N).all()
    assert values_N.max() < 90
    assert np.bincount(values_N).argmax() < 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss", "--output", "absent/loss.json"], "absent does not exist"),
        (["loss", "--output", "loss.json", "--rows", "0"], "--rows 0 must be at least 1"),
        (["loss", "--output", "loss.json", "--vocab-size", "20"], "--entries 64 distinct ids do not fit"),
        (["loss", "--output", "loss.json", "--alpha", "2"], "--alpha 2.0 must lie in"),
        (["targets", "--output", "targets.json", "--keys", "keys"], "go together"),
        (["targets", "--output", "targets.json", "--soft-perplexity", "2000"], "--soft-perplexity 2000 must lie"),
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
    assert tools("bench").main(words) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_names_what_exists(tools: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench = tools("bench")
    for words in ([], ["nothing"]):
        with pytest.raises(SystemExit) as stopped:
            bench.main(words)
        assert stopped.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said and (TOOLS / "benchmarks" / f"{name}.py").is_file() for name in bench.NAMES)


def test_output_directory_is_refused(tools: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory: name a file"):
        tools("benchmarks.common").check_output(tmp_path)
