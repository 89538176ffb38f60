"""For tests of the lm-evaluation-harness, an extra that launch/setup.sh leaves out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed: pip install -c requirements.txt -r tests/requirements-lm-eval.txt",
)


def leave_out_its_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The harness reads 13,000 files of tasks next to its manager, which takes 7 s: there are none now."""
    folder = tmp_path / "no_tasks"
    folder.mkdir()
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
