"""Waiting: short pauses at first, long ones later; and what a round asks of the file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.core import claims, waiting
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.waiting import Choice, Patience
from mlpmem_ds.core.world import World

from .toy_stage import Config


class Clock:
    """Time as the module sees it; sleeping advances it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pauses = 0.0, list[float]()
        monkeypatch.setattr(waiting.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(waiting.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_pauses_grow_with_the_time_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    patience = Patience()
    while clock.now < 3600:
        patience.sleep()
    assert clock.pauses[0] == 0.2 and clock.pauses[-1] == 30 and clock.pauses == sorted(clock.pauses)
    assert len(clock.pauses) < 150  # of 18,000 by the old rule


def test_any_free_unit_is_tried_else_those_whose_holder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock.now)
    choice = Choice(lambda unit: tmp_path / unit)
    assert {choice.of(["a", "b", "c"], []) for _ in range(100)} == {"a", "b", "c"}
    alive = [f"alive{number}" for number in range(20)]
    for unit in [*alive, "gone"]:
        (tmp_path / unit).write_text("elsewhere - 1")
    found = None
    for _ in range(1000):
        clock.now += 30
        for unit in alive:
            os.utime(tmp_path / unit, (clock.now, clock.now))
        found = choice.of([], [*alive, "gone"])
        if found:
            break
    assert found == "gone"


def test_a_round_of_waiting_costs_the_same_for_any_number_of_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,047 other ranks hold a unit each, for a while."""
    clock = Clock(monkeypatch)
    directory = open_stage(
        tmp_path / "out",
        stage="toy",
        version=1,
        config=Config(output=tmp_path / "out"),
        inputs={},
        world=World(rank=0, size=2048),
    )
    units = [f"{number:04d}" for number in range(2048)]

    def compute(unit: str, writer: UnitWriter) -> None:
        for other in units[1:]:
            path = directory.records.claim_path(other)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("elsewhere - 1")

    directory.run_units(units, compute)
    rounds = 10

    def finish() -> None:
        for unit in units[1:]:
            directory.records.publish(unit, [], {})

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if len(clock.pauses) == rounds:
            counter_total.update(counter)
            finish()

    counter_total: dict[str, int] = {}
    monkeypatch.setattr(waiting.time, "sleep", sleep)
    with counted_calls(tmp_path) as counter:
        directory._wait(units)
    assert len(clock.pauses) == rounds
    assert counter_total["listings"] / rounds <= 4  # a listing a folder of 1,000
    assert (counter_total["opens"] + counter_total["stats"]) / rounds <= 10
