"""The GPU check on a CPU: what it says of a step that fails or is slow; the steps at tiny sizes."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds import commands
from mlpmem_ds.benchmarks.gpu_check import gpu_check, pipeline, ranks
from mlpmem_ds.benchmarks.gpu_check.figures import Figure, Reporter, as_json, read_figures
from mlpmem_ds.benchmarks.gpu_check.gpu_check import Config, Result
from mlpmem_ds.benchmarks.gpu_check.sizes import rehearsal_sizes
from mlpmem_ds.benchmarks.gpu_check.steps import STEPS, Context, Step, figures_path, run_step
from mlpmem_ds.core.config import parse_config

BY_NAME = {step.name: step for step in STEPS}
ROOT = Path(__file__).parents[3]


def config(tmp_path: Path, **flags: Any) -> Config:
    return Config(output=tmp_path / "check.json", rehearse=True, **flags)


def figure(value: float, goal: float | None, direction: str = "at most") -> Figure:
    return Figure(name="f", value=value, unit="s", goal=goal, direction=direction)  # type: ignore[arg-type]


def test_a_goal_is_met_in_its_direction_and_never_by_a_nan() -> None:
    assert figure(1.0, 1.0).is_met and not figure(1.1, 1.0).is_met
    assert figure(1.0, 1.0, "at least").is_met and not figure(0.9, 1.0, "at least").is_met
    assert figure(math.nan, None).is_met and not figure(math.nan, 1.0).is_met
    assert as_json(figure(math.nan, 1.0))["value"] is None


def test_a_rehearsal_judges_facts_and_not_speeds(tmp_path: Path) -> None:
    for is_rehearsal, goals in ((True, [None, 0.0]), (False, [1.0, 0.0])):
        path = tmp_path / f"{is_rehearsal}.jsonl"
        reporter = Reporter(path, is_rehearsal=is_rehearsal)
        reporter.speed("rate", 0.5, "1/s", at_least=1.0)
        reporter.fact("wrong", 0, at_most=0)
        assert [one.goal for one in read_figures(path)] == goals


def test_a_figure_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    Reporter(path, is_rehearsal=False).fact("whole", 1)
    path.write_text(path.read_text() + '{"name": "cut", "val')
    assert [one.name for one in read_figures(path)] == ["whole"]


def test_a_step_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    started = []

    def start(step: Step, _: Config, work: Path, seconds: float) -> Result:
        started.append(step.name)
        assert work.is_dir() and seconds <= step.max_seconds
        outcome = "failed" if step.name == "loss" else "done"
        figures = [figure(2.0, 1.0)] if step.name == "assign" else []
        return Result(step=step, outcome=outcome, seconds=1.0, figures=figures, said="why")  # type: ignore[arg-type]

    lines: list[str] = []
    flags = config(tmp_path, only="loss,search,assign")
    assert gpu_check.run(flags, start=start, write=lines.append) == 1
    assert started == ["loss", "search", "assign"]
    text = "".join(lines)
    assert "FAIL loss" in text and "OK   search" in text and "FAIL assign" in text and "| why" in text
    assert "MISSED f 2 s (at most 1)" in text and "FAIL: loss, assign; 3 s" in text
    report = json.loads((tmp_path / "check.json").read_text())
    assert [step["passed"] for step in report["steps"]] == [False, True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]


def test_the_quarter_of_an_hour_is_that_of_all_steps_of_one_gpu(tmp_path: Path) -> None:
    given: dict[str, float] = {}

    def start(step: Step, _: Config, work: Path, seconds: float) -> Result:
        given[step.name] = seconds
        return Result(step=step, outcome="done", seconds=seconds, figures=())

    flags = config(tmp_path, gpus=2, max_seconds=100.0)
    assert gpu_check.run(flags, start=start, write=lambda _: None) == 1
    assert sum(given[step.name] for step in STEPS if step.name in given and step.num_gpus == 1) <= 100
    assert given["keys_of_ranks"] == BY_NAME["keys_of_ranks"].max_seconds
    assert sum(step.max_seconds for step in STEPS if step.num_gpus == 1) <= 900


def test_a_slow_step_is_cut_off_with_what_it_started(tmp_path: Path) -> None:
    began = time.monotonic()
    result = gpu_check.run_in_process(BY_NAME["machine"], config(tmp_path), tmp_path, 0.2)
    assert result.outcome == "cut off" and not result.is_ok
    assert time.monotonic() - began < 30  # of a machine that may be busy


def test_what_the_machine_lacks_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", str(tmp_path / "check.json")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_check.main(words) == 2
    assert "--gpus 1: torch" in capsys.readouterr().err
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "no_such_package"))
    assert gpu_check.main([*words, "--rehearse"]) == 2
    assert "lacks no_such_package: bash launch/setup.sh" in capsys.readouterr().err
    assert gpu_check.main([*words, "--only", "train_of_ranks"]) == 2
    assert "with --gpus 2 or more keys_of_ranks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_needed_comes_with_the_package_and_its_extras() -> None:
    """Those that docs/install.md names for a machine with GPUs."""
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"(?ms)^(?:dependencies|gpu|test) = \[(.*?)\]$", project)
    brought = {name.replace("-", "_") for line in lists for name in re.findall(r'"([\w-]+)', line)}
    assert len(lists) == 3 and set(gpu_check.NEEDED) - {"faiss"} <= brought and "faiss_gpu_cu12" in brought


def test_what_the_tests_import_is_needed() -> None:
    """No step collects a file whose imports fail; what it asks for by `importorskip` may be missing."""
    for path in sorted((ROOT / "tests").glob("*/**/*.py")) + [ROOT / "tests" / "conftest.py"]:
        if path.name != "conftest.py" and not path.name.startswith("test_"):
            continue
        text = path.read_text()
        modules = set()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(str(node.module).partition(".")[0])
        modules -= {*sys.stdlib_module_names, "mlpmem_ds", *re.findall(r'importorskip\(\s*"(\w+)', text)}
        assert modules <= {*gpu_check.NEEDED}, path


@pytest.mark.parametrize("name", ["main_thread", "fresh_thread"])
def test_tests_that_did_not_run_are_not_ok(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pytest says so by an exit code alone: 4 where tests/conftest.py cannot be imported."""
    is_main = name == "main_thread"

    def run_none(*_: object, **__: object) -> int:
        return 4 if (threading.current_thread() is threading.main_thread()) == is_main else 0

    monkeypatch.setattr(pytest, "main", run_none)
    for step in ("twins", "libraries") if is_main else ("twins",):
        with pytest.raises(RuntimeError, match="pytest ended with code 4"):
            run_step(BY_NAME[step], tmp_path, num_gpus=1, is_rehearsal=False)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_has_its_function(step: Step) -> None:
    assert callable(step.load()) and step.load().__doc__


def figures_of(name: str, work: Path) -> dict[str, Figure]:
    run_step(BY_NAME[name], work, num_gpus=1, is_rehearsal=True)
    figures = {one.name: one for one in read_figures(figures_path(work, name))}
    assert all(one.is_met for one in figures.values()), [str(one) for one in figures.values()]
    return figures


@pytest.mark.parametrize("name", ["loss", "search", "assign"])
def test_the_steps_of_kernels_run_at_tiny_sizes(name: str, tmp_path: Path) -> None:
    assert len(figures_of(name, tmp_path)) >= 4


def test_extraction_checkpoint_and_generation_run_at_tiny_sizes(tmp_path: Path) -> None:
    assert figures_of("extract", tmp_path)["tokens_per_second"].value > 0
    with pytest.raises(FileNotFoundError, match="the step `checkpoint` makes it"):
        figures_of("generate", tmp_path)
    assert figures_of("checkpoint", tmp_path)["stopped_at_step"].value >= 1
    assert figures_of("generate", tmp_path)["agreed_with_growing_cache"].value == 1


def test_the_command_lines_of_trainings_and_ranks_have_flags_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes themselves are left to a whole rehearsal."""
    called = []

    def parse(reports: Path, name: str, *words: object, ranks: int | None = None, max_steps: int = 0) -> Any:
        command = getattr(commands, name.replace("-", "_"))
        output = parse_config(commands._load(command.config), [str(word) for word in words], prog=name).output
        called.append((name, ranks, max_steps > 0))
        output.mkdir(parents=True)
        (output / "manifest.json").write_text("{}")
        (output / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        return [{"gpus": [rank], "peak_bytes": 1, "idle_share": 0.0} for rank in range(ranks or 1)]

    context = Context(
        sizes=rehearsal_sizes(),
        work=tmp_path,
        num_gpus=2,
        report=Reporter(tmp_path / "figures.jsonl", is_rehearsal=True),
    )
    monkeypatch.setattr(ranks, "probed_front_end", parse)
    monkeypatch.setattr(pipeline, "probed_front_end", parse)
    for step in STEPS:
        if step.num_gpus > 1:
            step.load()(context)
    pipeline.measure_training(context)
    assert called[:6] == [
        (name, ranks, False)
        for name in ("extract-keys", "build-index", "write-targets")
        for ranks in (2, None)
    ]
    assert called[6:] == [("train", number, True) for number in (None, 2, 2, 2, None, None, None)]
    figures = {one.name: one for one in read_figures(tmp_path / "figures.jsonl")}
    assert all(figures[f"ranks_on_other_gpus_{name}"].value == 0 for name in ("keys", "zero1", "zero3"))
    assert figures["same_targets_as_one_rank"].value == 1


def test_a_rank_on_the_gpu_of_another_is_counted(tmp_path: Path) -> None:
    context = Context(
        sizes=rehearsal_sizes(),
        work=tmp_path,
        num_gpus=3,
        report=Reporter(tmp_path / "figures.jsonl", is_rehearsal=True),
    )
    ranks._report_gpus(context, "keys", [{"gpus": [0]}, {"gpus": [0, 1]}, {"gpus": [0]}])
    (one,) = read_figures(tmp_path / "figures.jsonl")
    assert one.value == 2 and not one.is_met
