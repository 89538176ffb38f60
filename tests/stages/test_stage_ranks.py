"""Ranks of a stage: a foreign output is refused before anything is made in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.stages import stage_ranks
from mlpmem_ds.stages.stage_ranks import exchange_folder, open_stage_ranks


@dataclass(frozen=True)
class Config:
    output: Path
    exchange: Any
    rank_timeout_seconds: float = 90.0


@pytest.mark.parametrize("exchange", ["none", "files"])
def test_a_foreign_output_is_refused_before_ranks_meet(tmp_path: Path, exchange: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for output, said in ((tmp_path, "is not empty"), (tmp_path / "mine.txt", "is a file")):
        with pytest.raises(UserError, match=said):
            open_stage_ranks(Config(output, exchange), World(rank=1, size=2), stage="keys")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_leftovers_are_no_foreign_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists").mkdir()
    given: dict[str, Any] = {}

    def connect(world: World, how: str, environment: Any, *, folder: Path, timeout_seconds: float) -> None:
        given[how] = (folder, timeout_seconds)

    monkeypatch.setattr(stage_ranks, "open_ranks", connect)
    config = Config(tmp_path, "files", 7.0)
    open_stage_ranks(config, World(rank=1, size=2), stage="targets", leftovers=["lists"])
    assert given == {"files": (exchange_folder(tmp_path), 7.0)} and not exchange_folder(tmp_path).exists()
