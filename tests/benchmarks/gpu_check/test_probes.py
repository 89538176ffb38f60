"""A command that says what its rank used: idle share, steps, GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlpmem_ds import commands
from mlpmem_ds.benchmarks.gpu_check import probes
from mlpmem_ds.benchmarks.gpu_check.probes import EnoughSteps, StepProbe, idle_share


def test_idle_share_is_the_time_without_an_open_span() -> None:
    assert idle_share([(0, 4), (1, 2), (6, 8)]) == pytest.approx(0.25)
    assert idle_share([(5, 7), (0, 5)]) == 0
    assert idle_share([]) is None and idle_share([(1, 1)]) is None


def test_a_training_is_profiled_and_ended_after_its_steps() -> None:
    steps = []

    def step(engine: Any, number: int) -> int:
        steps.append(float(torch.ones(10).sum()))
        return number

    probe = StepProbe(step, 12)
    assert [probe(None, number) for number in range(12)] == list(range(12))  # type: ignore[arg-type]
    with pytest.raises(EnoughSteps):
        probe(None, 12)  # type: ignore[arg-type]
    assert len(steps) == 12 and probe.idle_share is not None and 0 <= probe.idle_share < 1


def test_a_training_of_few_steps_is_not_profiled() -> None:
    probe = StepProbe(lambda engine: None, 4)
    for _ in range(4):
        probe(None)  # type: ignore[arg-type]
    probe.close()
    assert probe.idle_share is None


def test_the_report_is_that_of_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(commands, "inspect_run", lambda argv, prog: 7)
    assert probes.main([str(tmp_path), "0", "inspect-run", "x"]) == 7
    assert json.loads((tmp_path / "rank-3.json").read_text())["idle_share"] is None
