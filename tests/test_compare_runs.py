"""The script that compares two versions' runs finds every kind of difference, and its commands can be run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("compare_runs.py")


def load(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where dataclasses look up their annotations
    specification.loader.exec_module(module)
    return module


compare_runs = load(SCRIPT)

EVALUATION = {
    "date": "today",
    "arms": [
        {"name": "base", "ppl": 20.5, "seconds": 1.0, "splits": {"test": {"ppl": 20.5}}},
        {"name": "base+memory", "ppl": 15.25, "seconds": 2.0, "bytes": 10_000, "lambda": 0.4},
    ],
    "speeds": [{"arm": "base", "tokens_per_second": 100.0}],
}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal runs, as small as they can be."""
    for number, folder in enumerate(compare_runs.FOLDERS):
        (tmp_path / "before" / folder / "shards").mkdir(parents=True)
        np.save(tmp_path / "before" / folder / "shards" / "data.npy", np.arange(5) + number)
        (tmp_path / "before" / folder / "manifest.json").write_text("{}")
    for folder in ("base", "memory"):
        lines = [json.dumps({"step": step, "loss": 4.5 - step, "time": step}) for step in range(3)]
        (tmp_path / "before" / folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "before" / "report" / "eval.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "before" / "done").mkdir()
    (tmp_path / "before" / "done" / "export").touch()
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    return tmp_path / "before", tmp_path / "after"


def run_script(*runs: Path) -> tuple[int, str]:
    ended = subprocess.run([sys.executable, str(SCRIPT), *map(str, runs)], capture_output=True, text=True)
    return ended.returncode, ended.stdout


def change_evaluation(after: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = after / "report" / "eval.json"
    evaluation = json.loads(path.read_text())
    change(evaluation)
    path.write_text(json.dumps(evaluation))


def test_equal_runs_pass_though_times_manifests_and_logs_differ(runs: tuple[Path, Path]) -> None:
    before, after = runs
    (after / "keys" / "manifest.json").write_text('{"another": "word"}')
    (after / "keys" / "log.jsonl").write_text("{}")

    def change(evaluation: dict[str, Any]) -> None:
        evaluation["date"] = "tomorrow"
        evaluation["arms"][0]["seconds"] = 9.0
        evaluation["speeds"][0]["tokens_per_second"] = 7.0
        evaluation["arms"][1]["bytes"] += 3  # a longer config.json

    change_evaluation(after, change)
    code, table = run_script(before, after)
    assert code == 0 and "DIFFERENT" not in table
    assert all(f"{folder}: files" in table for folder in compare_runs.FOLDERS)


@pytest.mark.parametrize("folder", compare_runs.FOLDERS)
def test_one_other_byte_in_any_directory_is_found(runs: tuple[Path, Path], folder: str) -> None:
    before, after = runs
    path = after / folder / "shards" / "data.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    code, table = run_script(before, after)
    assert code == 1 and f"DIFFERENT  {folder}: files  shards/data.npy: other bytes" in table


def test_files_that_are_missing_or_new_are_differences_and_a_renamed_file_is_not(
    runs: tuple[Path, Path],
) -> None:
    before, after = runs
    (after / "keys" / "shards" / "data.npy").rename(after / "keys" / "codes.npy")
    assert run_script(before, after)[0] == 0
    (after / "index" / "shards" / "data.npy").unlink()
    code, table = run_script(before, after)
    assert code == 1 and "shards/data.npy: only before" in table and "keys: files  shards" in table
    np.save(after / "index" / "shards" / "data.npy", np.arange(5) + 3)
    np.save(after / "index" / "more.npy", np.ones(3))
    code, table = run_script(before, after)
    assert code == 1 and "more.npy: only after" in table


def test_a_few_other_numbers_are_accepted_only_where_a_reason_is_listed(runs: tuple[Path, Path]) -> None:
    before, after = runs
    scores = np.zeros(5000, np.float32)
    for name in ("test-base+knn_ivfpq-0.npy", "test-base+memory-0.npy"):
        for root, number in ((before, 0), (after, 1)):
            np.save(root / "report" / name, np.append(scores, np.float32(number)))
    code, table = run_script(before, after)
    assert code == 1 and "DIFFERENT  report: files  test-base+memory-0.npy" in table
    assert "test-base+knn_ivfpq-0.npy: 1 of 5,001 numbers differ: of keys at equal distance" in table
    shutil.copyfile(before / "report" / name, after / "report" / name)
    assert run_script(before, after)[0] == 0
    np.save(after / "report" / "test-base+knn_ivfpq-0.npy", np.append(scores, np.zeros(1, np.float32)) + 1)
    assert run_script(before, after)[0] == 1


@pytest.mark.parametrize("folder", ["base", "memory"])
def test_another_loss_is_found(runs: tuple[Path, Path], folder: str) -> None:
    before, after = runs
    path = after / folder / "metrics.jsonl"
    path.write_text(path.read_text().replace("2.5", "2.5000001"))
    code, table = run_script(before, after)
    assert code == 1 and f"{folder}: metrics.jsonl  /2/loss: 2.5 → 2.5000001" in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda evaluation: evaluation["arms"][1].update(ppl=15.26), "/arms/base+memory/ppl: 15.25 → 15.26"),
        (
            lambda evaluation: evaluation["arms"][1].pop("lambda"),
            "/arms/base+memory/lambda: 0.4, only before",
        ),
        (lambda evaluation: evaluation["arms"][1].update(bytes=11_000), "bytes: 10000 → 11000"),
        (lambda evaluation: evaluation["arms"].pop(), "/arms/base+memory/ppl: 15.25, only before"),
    ],
)
def test_another_figure_of_an_arm_is_found(
    runs: tuple[Path, Path], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_evaluation(runs[1], change)
    code, table = run_script(*runs)
    assert code == 1 and message in table


def test_a_figure_that_was_moved_or_renamed_within_its_arm_is_not_different(runs: tuple[Path, Path]) -> None:
    def change(evaluation: dict[str, Any]) -> None:
        evaluation["arms"].reverse()
        evaluation["arms"][0]["choice"] = {"lambda": evaluation["arms"][0].pop("lambda")}
        evaluation["arms"][0]["perplexity"] = evaluation["arms"][0].pop("ppl")

    change_evaluation(runs[1], change)
    code, table = run_script(*runs)
    assert code == 0 and "/arms/base+memory/lambda is now /arms/base+memory/choice/lambda" in table
    change_evaluation(runs[1], lambda evaluation: evaluation["arms"][0].update(perplexity=99.5))
    assert run_script(*runs)[0] == 1


def test_the_commands_of_the_pipeline_have_the_flags_that_the_script_gives(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = compare_runs.stages()
    assert tuple(stage.name for stage in stages) == compare_runs.FOLDERS
    for stage in stages:
        with pytest.raises(SystemExit):
            load(SCRIPT.parent.parent / stage.program).main(["--help"])
        shown = capsys.readouterr().out
        flags = [word for word in stage.words if word.startswith("--")]
        assert [flag for flag in flags if f"{flag} " not in shown] == []


def test_the_text_is_the_standard_librarys_up_to_so_many_bytes(tmp_path: Path) -> None:
    compare_runs.write_text(tmp_path / "text", 100_000)
    sizes = [path.stat().st_size for path in (tmp_path / "text").iterdir()]
    assert 50_000 < sum(sizes) <= 100_000 and len(sizes) > 3
