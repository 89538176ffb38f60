"""The evaluation over many ranks, killed and resumed: the same bytes and numbers."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.world import World
from mlpmem_ds.engines import model_files
from mlpmem_ds.formats.evaluation import Evaluation, open_report, read_evaluation
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.stages.evaluation import evaluate, units
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass
from mlpmem_ds.stages.evaluation.inputs import open_inputs

from .conftest import UNIT, Finished, bytes_of_scores

TIMES = {"tokens_per_second", "seconds"}


def check_equal_results(root: Path, evaluation: Evaluation, finished: Finished) -> None:
    """The bytes of every score, and every number of eval.json but the times."""
    assert bytes_of_scores(root) == bytes_of_scores(finished.config.output)
    for before, after in zip(finished.evaluation.arms, evaluation.arms, strict=True):
        assert {name: value for name, value in vars(before).items() if name not in TIMES} == {
            name: value for name, value in vars(after).items() if name not in TIMES
        }
    assert evaluation.breakdowns == finished.evaluation.breakdowns


@pytest.mark.parametrize(("rank", "size"), [(1, 2), (2, 3)])
def test_one_rank_of_several_working_alone_writes_the_bytes_of_one_rank(
    config: Config, finished: Finished, rank: int, size: int
) -> None:
    assert (
        evaluate.run(replace(config, samples=0, speed_positions=None), World(rank=rank, size=size))
        is not None
    )
    check_equal_results(config.output, read_evaluation(config.output), finished)


def test_three_ranks_killed_at_random_leave_the_bytes_of_one(
    config: Config, finished: Finished, killed_runs: Callable[..., int]
) -> None:
    config = replace(config, samples=0, speed_positions=None)
    assert killed_runs(evaluate.run, config, ranks=3, kills=1, seed=3) == 1
    for root in (config.output, config.output.with_name(f"{config.output.name}-undisturbed")):
        check_equal_results(root, read_evaluation(root), finished)
        open_report(root)


def test_a_run_that_stopped_in_a_unit_continues_after_the_units_that_are_done(
    config: Config, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, speed_positions=None)  # which runs the base too
    calls = []
    real = ForwardPass.scan

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("stopped")
        return real(*arguments)

    monkeypatch.setattr(ForwardPass, "scan", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate.run(config, World())
    assert _num_scored(config) == 3
    evaluate.run(config, World())
    assert len(calls) == 4 + _num_scored(config) - 3
    assert bytes_of_scores(config.output) == bytes_of_scores(finished.config.output)


def test_a_damaged_score_is_found_and_made_again(config: Config, finished: Finished) -> None:
    shutil.copytree(finished.config.output, config.output)
    victim = sorted((config.output / "scores").iterdir())[3]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    evaluate.run(config, World())
    assert bytes_of_scores(config.output) == bytes_of_scores(finished.config.output)


def test_another_grid_reads_the_same_scores(
    config: Config, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.config.output, config.output)
    monkeypatch.setattr(ForwardPass, "scan", lambda *_: pytest.fail("a forward pass for a grid"))
    evaluate.run(
        replace(config, lambdas=("0:0.5:0.5",), bootstrap_samples=150, speed_positions=None), World()
    )
    evaluation = read_evaluation(config.output)
    assert evaluation.lambdas == (0, 0.5)
    assert {arm.lmbda for arm in evaluation.arms} <= {None, 0, 0.5}


def test_progress_of_each_rank_counts_its_own_share_and_one_rank_names_the_report(
    config: Config, finished: Finished, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished.config.output, config.output)
    totals = []
    real = units.Progress
    monkeypatch.setattr(
        units, "Progress", lambda total, **words: totals.append(total) or real(total, **words)
    )
    with caplog.at_level("INFO", logger="mlpmem_ds"):
        for rank in range(2):
            evaluate.run(replace(config, speed_positions=None, samples=0), World(rank=rank, size=2))
    inputs = open_inputs(config, World())
    passes = {arm.forward_pass for arm in inputs.arms}
    positions = sum(corpus.num_positions for corpus in inputs.streams.values()) * len(passes)
    assert sum(totals) == positions and 0 < min(totals) <= max(totals) < positions
    assert caplog.text.count(f"the report is {config.output / 'report.md'}") == 1


def test_the_fingerprint_of_each_model_is_computed_by_one_of_the_ranks(
    config: Config, artifacts: Path, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base, a control that is a model, and one that is an exported memory."""
    export, read = tmp_path / "export", []
    MemoryAugmentedLM.from_pretrained(base_dir, artifacts / "memory").save_pretrained(export)
    config = replace(config, keys=None, index=None, targets=None, control=(*config.control, f"x={export}"))
    original = model_files._sha256_of_files

    def counted(paths: Sequence[Path], *more: Any) -> str:
        read.append(paths[0].parent.name)
        return original(paths, *more)

    monkeypatch.setattr(model_files, "_sha256_of_files", counted)
    found = [open_inputs(config, World(rank=rank, size=3)) for rank in range(3)]
    assert sorted(read) == sorted(["export", "trained_on", Path(config.model).name])
    alone = open_inputs(config, World())
    for inputs in found:
        assert [arm.inputs for arm in inputs.arms] == [arm.inputs for arm in alone.arms]


def _num_scored(config: Config) -> int:
    """Units of the report that are done, but for those that compare its inputs with their checksums."""
    done = [path.name for path in (config.output / "done").iterdir()]
    return sum(not name.startswith("verified-") for name in done)


def _command(config: Config) -> list[str]:
    flags = {
        "model": config.model,
        "corpus": config.corpus,
        "output": config.output,
        "memory": config.memory[0],
        "keys": config.keys,
        "index": config.index,
        "targets": config.targets,
        "nprobe": 4,
        "bootstrap-samples": 200,
        "bootstrap-block": 32,
        "unit-positions": UNIT,
        "batch-windows": 3,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*words, "--control", *config.control]


def test_front_end_prints_the_table_and_refuses_with_2(
    config: Config, finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    specification = importlib.util.spec_from_file_location(
        "evaluate_front_end", Path(__file__).parents[3] / "launch" / "evaluate.py"
    )
    assert specification is not None and specification.loader is not None
    front_end = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(front_end)
    shutil.copytree(finished.config.output, config.output)
    assert front_end.main(_command(config)) == 0
    assert "base+memory_ce_only" in capsys.readouterr().out
    assert front_end.main([*_command(config), "--lambdas", "0:1.5:0.1"]) == 2
    assert "between 0 and 1" in capsys.readouterr().err
