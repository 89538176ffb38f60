"""A value that one rank computes and the others read."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core import once
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


def test_a_claim_that_a_third_rank_took_meanwhile_is_not_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first holder is lost; before the next try another rank has taken the claim and makes the value."""
    now, texts = [0.0], list[str]()
    monkeypatch.setattr("mlpmem_ds.core.claims.time.monotonic", lambda: now[0])
    computed_once(tmp_path, "answer", "v1", lambda: {"answer": 1})
    (value,) = tmp_path.glob(".answer-*")
    content, claim_path = value.read_bytes(), value.with_name(f"{value.name}.claim")
    value.unlink()
    claim_path.write_text("elsewhere - 1")

    def pass_time(patience: Any) -> None:
        texts.append(claim_path.read_text())
        now[0] += 61
        if len(texts) == 1:
            claim_path.write_text("third - 2")
        if len(texts) == 2:
            value.write_bytes(content)

    monkeypatch.setattr(once.Patience, "sleep", pass_time)
    found = computed_once(tmp_path, "answer", "v1", lambda: pytest.fail("the third rank is at it"))
    assert found == {"answer": 1} and claim_path.read_text() == "third - 2"


def test_the_claim_of_a_lost_rank_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("mlpmem_ds.core.claims.time.monotonic", lambda: now[0])
    monkeypatch.setattr(once.Patience, "sleep", lambda patience: now.append(now.pop() + 61))
    computed_once(tmp_path, "answer", "v1", lambda: {"answer": 1})
    (value,) = tmp_path.glob(".answer-*")
    value.unlink()
    value.with_name(f"{value.name}.claim").write_text("elsewhere - 1")
    assert computed_once(tmp_path, "answer", "v1", lambda: {"answer": 2}) == {"answer": 2}


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
