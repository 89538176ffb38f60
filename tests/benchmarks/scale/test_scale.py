"""`bench scale`: every measure is taken, compared with its goal, and a failing one does not stop the rest."""

from __future__ import annotations

import json
import math
import tempfile
from functools import partial
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.bench import main
from mlpmem_ds.benchmarks.scale import scale
from mlpmem_ds.benchmarks.scale.measure import Measure
from mlpmem_ds.core.errors import UserError


def fixed(value: float, work: Path) -> float:
    assert list(work.iterdir()) == []
    (work / "file").write_text("left")
    return value


def fails(work: Path) -> float:
    raise RuntimeError("no number")


def measure(name: str, value: float, goal: float, direction: str) -> Measure:
    return Measure(
        name=name,
        function=partial(fixed, value),
        goal=goal,
        direction=direction,  # type: ignore[arg-type]
        meaning="a fixed number",
    )


LOW = measure("low", 1.0, 1.1, "at most")
HIGH = measure("high", 2.0, 3.0, "at least")
BROKEN = Measure(name="broken", function=fails, goal=0, direction="exactly", meaning="fails")


@pytest.mark.parametrize(
    ("value", "direction", "is_met"),
    [
        (1.0, "at most", True),
        (1.1, "at most", False),
        (1.0, "at least", True),
        (0.9, "at least", False),
        (1.0, "exactly", True),
        (2.0, "exactly", False),
        (math.nan, "at most", False),
        (math.nan, "at least", False),
    ],
)
def test_a_goal_is_met_in_its_direction(value: float, direction: str, is_met: bool) -> None:
    assert measure("any", value, 1.0, direction).is_met_by(value) is is_met


def test_the_report_has_numbers_goals_and_says_what_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "MEASURES", (LOW, HIGH))
    assert main(["scale", "--output", str(tmp_path / "scale.json")]) == 0
    report = json.loads((tmp_path / "scale.json").read_text())
    assert report["ratios"] == {"low": 1.0, "high": 2.0}
    assert {name: goal["passed"] for name, goal in report["goals"].items()} == {"low": True, "high": False}
    said = capsys.readouterr().out
    assert "MISSED  high" in said and "1 of 2 goals are met" in said
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]


def test_a_measure_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "MEASURES", (BROKEN, LOW))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert main(["scale", "--output", str(tmp_path / "scale.json")]) == 1
    assert "error: no number (RuntimeError" in capsys.readouterr().err
    assert json.loads((tmp_path / "scale.json").read_text())["ratios"] == {"low": 1.0}


def test_only_names_measures() -> None:
    assert scale.chosen_measures("high,low", [LOW, HIGH]) == [HIGH, LOW]
    assert scale.chosen_measures(None, [LOW, HIGH]) == [LOW, HIGH]
    with pytest.raises(UserError, match="--only medium: the measures are low, high"):
        scale.chosen_measures("medium,low", [LOW, HIGH])


def test_the_names_of_the_measures_are_distinct() -> None:
    names = [measure.name for measure in scale.MEASURES]
    assert len(set(names)) == len(names)
