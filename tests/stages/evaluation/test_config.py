"""Flags of the evaluation: their bounds and the grid of λ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages.evaluation.config import Config, lambda_grid


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Flags of inputs that need not exist: a Config opens nothing."""
    return Config(
        model="base",
        corpus=tmp_path / "corpus",
        output=tmp_path / "report",
        memory=(str(tmp_path / "memory"),),
        keys=tmp_path / "keys",
        index=tmp_path / "index",
    )


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"lambdas": ("0:1.2:0.1",)}, "between 0 and 1"),
        ({"lambdas": ("-0.1:1:0.1",)}, "between 0 and 1"),
        ({"lambdas": ("0:1",)}, "first:last:step"),
        ({"lambdas": ("0:1:0",)}, "first:last:step"),
        ({"lambdas": ("0:1:nan",)}, "first:last:step"),
        ({"lambdas": ("1:1:0.1",)}, "need a λ below 1"),
        ({"k": 0}, "--k must be at least 1, not 0"),
        ({"nprobe": 0}, "--nprobe"),
        ({"samples": -1}, "--samples must be at least 0, not -1"),
        ({"speed_positions": -5}, "--speed-positions must be at least 1, not -5"),
        ({"temperature": -1.0}, "--temperature"),
        ({"bootstrap_samples": 3}, "--bootstrap-samples"),
        ({"test_split": "tuning"}, "must differ"),
        ({"keys": None}, "--index needs --keys"),
        (
            {"keys": None, "index": None, "targets": Path("t")},
            "--targets is of --keys, which adds the kNN arms: add that, or leave it out",
        ),
        (
            {"keys": None, "index": None, "exact": False, "k": 8},
            "--exact, --k are of --keys, which adds the kNN arms: add that, or leave them out",
        ),
        ({"memory": ("a=m", "b=./m")}, "--memory names m twice .as ./m.: give each once"),
        ({"lambdas": ("0:1:1e-9",)}, "more than 1,000 steps"),
        ({"control": ("nameless",)}, "NAME=DIR"),
        ({"control": ("base=/tmp",)}, "is taken"),
        ({"control": ("base+memory=/tmp",)}, "is taken"),
        ({"control": ("base + x=/tmp",)}, "NAME=DIR"),
        ({"control": ("a=/tmp", "a=/tmp")}, "is taken"),
    ],
)
def test_flags_out_of_bounds_are_refused_by_name(
    config: Config, changes: dict[str, Any], needle: str
) -> None:
    with pytest.raises(UserError, match=needle):
        replace(config, **changes)


def test_lambda_grid_has_both_ends() -> None:
    grid = lambda_grid(["0:1:0.05"]).lambdas
    assert len(grid) == 21 and grid[0] == 0.0 and grid[-1] == 1.0 and grid[7] == 0.35
