"""From made-up scores of documents: λ of the tuning half, all else of the other, and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.formats.suites import Suites, TaskScores, read_suites, write_suites
from mlpmem_ds.stages.harness.suite_page import page_of
from mlpmem_ds.stages.harness.suite_results import TaskLines, score_task

WEIGHTS = ("0", "0.5", "1", "gate")
METADATA = {"title": "Toy", "begin_tokens": False, "tuned_by": "acc"}


def made_up(tuning: list[list[float]], reported: list[list[float]], **more: Any) -> TaskLines:
    """Lines of which each row has a score at each weighting."""
    lines = [
        {
            "document": number,
            "half": half,
            "scores": {"acc": row, "other": [0.0] * len(row)},
            "chance": {"acc": 0.25},
        }
        for number, (half, row) in enumerate(
            [*(("tuning", row) for row in tuning), *(("reported", row) for row in reported)]
        )
    ]
    return TaskLines(
        weightings=more.pop("weightings", WEIGHTS), lines=lines, seconds=2.0, num_cut=1, speeds=more
    )


def scored(tuning: list[list[float]], reported: list[list[float]], **more: Any) -> TaskScores:
    lines = made_up(tuning, reported, **more)
    return score_task("toy", METADATA, {"joint": lines}, 200, groups=each_its_own(lines))


def each_its_own(lines: TaskLines) -> dict[int, str]:
    return {line["document"]: str(line["document"]) for line in lines.lines}


def test_the_choice_does_not_depend_on_the_reported_half() -> None:
    tuning = [[0, 1, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0]]
    for reported in ([[1, 0, 0, 0]] * 4, [[0, 0, 1, 1]] * 4):
        found = scored([list(map(float, row)) for row in tuning], [list(map(float, row)) for row in reported])
        assert found.lmbda == 0.5
        [metric, _] = found.metrics
        arms = {arm.arm: arm for arm in metric.arms}
        assert arms["base+memory"].value == reported[0][1] and arms["memory_alone"].value == reported[0][2]
        assert arms["base+memory+gate"].value == reported[0][3] and arms["base+memory+gate"].lmbda is None
        assert metric.tuning_curve == {"0": 1 / 3, "0.5": 1.0, "1": 1 / 3}
        assert metric.chance == 0.25 and (found.tuning, found.reported) == (3, 4)


def test_the_smallest_of_equal_weights_is_taken() -> None:
    assert scored([[1.0, 1.0, 1.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]).lmbda == 0.0
    assert scored([[0.0, 0.3, 0.3 + 1e-12, 1.0]], [[1.0] * 4]).lmbda == 0.5
    assert scored([[0.0, 0.0, 1.0, 1.0]], [[1.0] * 4]).lmbda == 1.0
    assert scored([], [[1.0] * 4]).lmbda == 0.0


def test_changes_are_paired() -> None:
    rows = [[float(number % 3 == 0), float(number % 2 == 0), 0.0, 0.0] for number in range(60)]
    [metric, _] = scored(rows, rows).metrics
    memory = next(arm for arm in metric.arms if arm.arm == "base+memory")
    assert memory.change == pytest.approx(1 / 2 - 1 / 3) and memory.interval is not None
    low, high = memory.interval
    assert low < memory.change < high
    base = metric.arms[0]
    assert base.arm == "base" and base.change is None and base.lmbda == 0.0


def test_documents_of_a_group_are_drawn_together() -> None:
    rows = [[0.0, float(number // 2 % 2), 0.0, 0.0] for number in range(60)]
    lines = made_up([[0.0, 1.0, 0.0, 0.0]], rows)
    pairs = {number: str((number + 1) // 2) for number in range(61)}
    widths = []
    for groups in (each_its_own(lines), pairs):
        [metric, _] = score_task("toy", METADATA, {"joint": lines}, 1000, groups=groups).metrics
        interval = next(arm.interval for arm in metric.arms if arm.arm == "base+memory")
        assert interval is not None and interval[0] < 0.5 < interval[1]
        widths.append(interval[1] - interval[0])
    assert widths[1] == pytest.approx(widths[0] * 2**0.5, rel=0.15)  # 30 draws in place of 60


def test_other_readers_and_speeds() -> None:
    speeds = {"0": [1.0, 2.0, 40.0], "0.5": [2.0, 4.0, 40.0], "1": [2.0, 4.0, 20.0]}
    joint = made_up([[0.0, 1.0, 0.0]], [[0.0, 1.0, 0.0]], weightings=WEIGHTS[:3], **speeds)
    other = made_up([[1.0]], [[0.5]], weightings=("0",), **{"0": [4.0, 8.0, 8.0]})
    found = score_task("toy", METADATA, {"joint": joint, "other": other}, 100, groups=each_its_own(joint))
    assert [arm.arm for arm in found.metrics[0].arms] == ["base", "base+memory", "memory_alone", "other"]
    assert {speed.arm: (speed.first_token_seconds, speed.tokens_per_second) for speed in found.speeds} == {
        "base": (0.5, 20.0),
        "base+memory": (1.0, 10.0),
        "memory_alone": (1.0, 5.0),
        "other": (2.0, 1.0),
    }


def test_a_model_without_a_memory() -> None:
    found = scored([[1.0]], [[0.0]], weightings=("0",))
    assert found.lmbda is None and [arm.arm for arm in found.metrics[0].arms] == ["base"]


@pytest.fixture
def suites() -> Suites:
    tasks = (
        scored([[0.0, 0.0, 1.0, 1.0]] * 3, [[0.0, 0.5, 1.0, 1.0]] * 3, **{"0": [1.0, 2.0, 40.0]} | {
            name: [1.0, 2.0, 40.0] for name in WEIGHTS
        }),
        scored([[1.0, 0.0, 0.0, 1.0]] * 3, [[0.5, 0.5, 0.0, 1.0]] * 3),
    )  # fmt: skip
    arms = ("base", "base+memory", "memory_alone", "base+memory+gate")
    return Suites(
        suites=("paper",),
        arms={arm: f"what {arm} is" for arm in arms},
        tasks=tasks,
        left_out={"yahoo": "--data d has no yahoo.jsonl"},
        device="cpu",
    )


def test_the_page_marks_where_the_base_is_off(suites: Suites) -> None:
    page = page_of(suites)
    [first] = [line for line in page.splitlines() if line.startswith("| Toy | accuracy | 3 |")][:1]
    assert "| 25.0 | 0.0 | 100.0 | **1.00** | +100.0 (+100.0 … +100.0) | 100.0 | 100.0 |" in first
    assert "**1.00** marks λ = 1, where the base is switched off: 1 of 2 tasks" in page
    assert "memory is not used: 1" in page
    assert "| **mean** |  |  | 25.0 | 25.0 | 75.0 |" in page
    assert "- yahoo: --data d has no yahoo.jsonl" in page and "first token" in page
    assert "Fewer than 20 documents, too few for an interval: Toy, Toy." in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    tables = {line.count("|") for line in rows}
    assert len(tables) == 4
    assert "- Toy, joint: 1 of 6" in page.partition("## Cut off")[2]
    changes = page.partition("## Changes of the other arms")[2]
    assert "| task | memory alone | base+memory+gate |" in changes
    assert changes.count("| Toy | +100.0 (+100.0 … +100.0) | +100.0 (+100.0 … +100.0) |") == 1


def test_what_was_written_is_read_again(suites: Suites, tmp_path: Path) -> None:
    write_suites(tmp_path / "suites.json", suites)
    assert read_suites(tmp_path) == suites
    (tmp_path / "suites.json").write_text("[]")
    with pytest.raises(DamagedDataError, match="run run_lm_eval again"):
        read_suites(tmp_path)
