"""Units dealt by a counter: each to one rank, without claims; and those that no rank works at."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.core.dealing import DealtUnits, free_units
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_records import UnitRecords
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World

from .toy_stage import UNITS, Config, result_of


class Threads:
    """Ranks that are threads of this process; each has a view of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.numbers: Counter[str] = Counter()
        self._lock, self._barrier = threading.Lock(), threading.Barrier(size, timeout=30)

    def next_number(self, counter: str) -> int:
        with self._lock:
            self.numbers[counter] += 1
            return self.numbers[counter] - 1

    def wait(self) -> None:
        self._barrier.wait()


def run_together(config: Config, size: int) -> list[str]:
    """The toy stage, then a second list of units, on ranks with a counter; returns the units made."""
    dealer, made, failures = Threads(size), list[str](), list[BaseException]()
    opening = threading.Lock()

    def work(rank: int) -> None:
        with opening:  # ranks of one process have one name for temporary files
            directory = open_stage(
                config.output,
                stage="toy",
                version=1,
                config=config,
                inputs={"corpus": "i"},
                world=World(rank=rank, size=size),
                dealer=dealer,
            )

        def compute(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
            made.append(unit)
            writer.array(f"part-{unit}.npy", np.arange(4) * int(unit) * config.factor)
            return {"sum": int(unit)}

        assert len(directory.run_phase(UNITS[:2], compute)) == 2
        directory.run_units(UNITS[2:], compute)
        directory.complete(
            UNITS,
            lambda: {"total": sum(each["sum"] for each in directory.summaries(UNITS))},
            wait=True,
        )
        assert directory.manifest_path.is_file()

    def guarded(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            failures.append(error)
            dealer._barrier.abort()

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return made


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_counter_deals_each_unit_once_for_the_same_bytes(
    tmp_path: Path, straight: dict[str, str], size: int
) -> None:
    config = Config(output=tmp_path / "dealt")
    assert sorted(run_together(config, size)) == UNITS
    assert result_of(config.output) == straight
    (config.output / "part-3.npy").write_bytes(b"")
    assert run_together(config, size) == ["3"]
    assert result_of(config.output) == straight


def test_ranks_with_a_counter_make_no_claim_and_do_not_poll(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "dealt")
    with counted_calls(config.output) as calls:
        run_together(config, 2)
    assert not any(".claim" in name for name in calls if name != ".manifest.claim")
    assert calls["listings"] < 40


def test_a_dealer_of_one_rank_changes_nothing(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "one")
    world = World(rank=1, size=2)
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={}, world=world, dealer=Threads(1)
    )
    assert directory.run_units(UNITS, lambda unit, writer: None) == 5  # its own, then those not made


def test_every_number_below_the_count_is_a_unit() -> None:
    assert list(DealtUnits(["a", "b", "c"], Threads(1), "units")) == ["a", "b", "c"]


def test_the_unit_that_is_drawn_early_is_the_next_one_and_nobody_elses() -> None:
    dealer = Threads(2)
    one, other = (DealtUnits(["a", "b", "c", "d"], dealer, "units") for _ in range(2))
    assert next(one) == "a" and one.following() == one.following() == "b"
    assert next(other) == "c" and next(one) == "b" and other.following() == "d"
    assert one.following() is None and list(one) == [] and list(other) == ["d"]


def test_a_rank_is_told_what_it_makes_next(tmp_path: Path) -> None:
    """Another rank takes every third number: no fixed share tells the next unit."""
    dealer, told, made = Threads(2), list[str | None](), list[str]()
    config = Config(output=tmp_path / "out")
    world = World(rank=0, size=2)
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={}, world=world, dealer=dealer
    )
    assert directory.next_unit("5") == "5"  # nothing is dealt yet

    def compute(unit: str, writer: UnitWriter) -> None:
        made.append(unit)
        told.append(directory.next_unit("0"))
        dealer.next_number(next(iter(dealer.numbers)))

    directory.run_units(UNITS, compute)
    assert made == [*UNITS[:2], *UNITS[3::2]] and told == [*made[1:], None]


def test_units_with_a_record_or_a_claim_are_not_free(tmp_path: Path) -> None:
    records = UnitRecords(tmp_path, "i" * 64)
    (tmp_path / "done").mkdir()
    records.publish("1", [], {})
    records.claim_path("3").write_text("")
    assert list(free_units(UNITS, records, World(rank=0, size=2))) == []
    assert list(free_units(UNITS, records, World(rank=1, size=2))) == ["4", "2", "0"]


def test_two_directories_of_one_name_have_counters_of_their_own(tmp_path: Path) -> None:
    dealer = Threads(2)
    for parent, input_hash in (("a", "i"), ("b", "j")):
        output = tmp_path / parent / "out"
        directory = open_stage(
            output,
            stage="toy",
            version=1,
            config=Config(output=output),
            inputs={"corpus": input_hash},
            world=World(rank=0, size=2),
            dealer=dealer,
        )
        assert directory.run_units(UNITS, lambda unit, writer: None) == len(UNITS)
    assert len(dealer.numbers) == 2
