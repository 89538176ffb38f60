"""The measures of targets: small, the same code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.benchmarks.scale.targets import MEASURES, list_search_over_today_cpu, owners_over_alone_cpu

SMALL: dict[str, Any] = {"num_keys": 1 << 14, "num_dims": 16, "num_lists": 8, "nprobe": 2, "k": 16, "runs": 1}


def test_ranks_that_exchange_and_ranks_that_do_not_are_measured(
    tmp_path: Path, forked_commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(forked_commands / "python"))
    (tmp_path / "exchange").mkdir()
    (tmp_path / "owners").mkdir()
    assert list_search_over_today_cpu(tmp_path / "exchange", **SMALL) > 0
    assert owners_over_alone_cpu(tmp_path / "owners", **SMALL, num_queries=64) > 0
    assert [measure.name for measure in MEASURES] == ["list_search_over_today_cpu", "owners_over_alone_cpu"]
