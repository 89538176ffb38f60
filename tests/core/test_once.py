"""A value that one rank computes and the others read."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mlpmem_ds.core.once import computed_once, remove_computed, shared_place
from mlpmem_ds.core.world import World

from .toy_stage import Config, run


def ask_slowly(folder: Path) -> int:
    """Run in a process of its own."""

    def compute() -> Mapping[str, Any]:
        with open(folder / "made", "a") as stream:
            stream.write("x")
        time.sleep(0.3)
        return {"answer": 42}

    answer: int = computed_once(folder, "answer", ["v1"], compute)["answer"]
    return answer


def test_one_of_several_ranks_computes(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as ranks:
        assert list(ranks.map(ask_slowly, [tmp_path] * 4)) == [42] * 4
    assert (tmp_path / "made").read_text() == "x"


def test_with_other_inputs_or_a_damaged_file_it_is_computed_anew(tmp_path: Path) -> None:
    values = iter(range(9))

    def ask(of: Any) -> Any:
        return computed_once(tmp_path, "answer", of, lambda: {"answer": next(values)})["answer"]

    assert [ask("a"), ask("a"), ask("b"), ask("a")] == [0, 0, 1, 0]
    for path in tmp_path.iterdir():
        path.write_text("{}")
    assert ask("a") == 2
    remove_computed(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_complete_stage_keeps_none_of_them(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "out")
    computed_once(config.output, "answer", 1, lambda: {"answer": 1})
    run(config, World())
    assert not list(config.output.glob(".*"))


def test_one_rank_writes_nothing_before_it_knows_its_inputs(tmp_path: Path) -> None:
    assert shared_place(tmp_path, World()) is None
    assert shared_place(tmp_path, World(rank=1, size=2)) == tmp_path
