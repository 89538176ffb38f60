"""An export to look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import save_export

LAMBDA = 0.4


@pytest.fixture(scope="module")
def export_dir(tmp_path_factory: pytest.TempPathFactory, base_dir: Path, corpus_dir: Path) -> Path:
    return save_export(tmp_path_factory.mktemp("viewing") / "export", base_dir, corpus_dir, lmbda=LAMBDA)
