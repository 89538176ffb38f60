"""The result of an undisturbed run of the toy stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.core.world import World

from .toy_stage import Config, result_of, run


@pytest.fixture
def straight(tmp_path: Path) -> dict[str, str]:
    run(Config(output=tmp_path / "straight"), World())
    return result_of(tmp_path / "straight")
