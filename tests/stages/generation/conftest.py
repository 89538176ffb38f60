"""A toy export, and the generation front-end as a user starts it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import save_export

ROOT = Path(__file__).parents[3]
LAMBDA = 0.45


@pytest.fixture(scope="module")
def export_dir(tmp_path_factory: pytest.TempPathFactory, base_dir: Path, corpus_dir: Path) -> Path:
    return save_export(tmp_path_factory.mktemp("generate") / "export", base_dir, corpus_dir, lmbda=LAMBDA)


@pytest.fixture
def generate(export_dir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """generate(*flags) → standard output of the front-end on the toy export; a failure shows its message."""

    def call(*words: object, model: Path = export_dir) -> str:
        code = run_front_end("--model", model, *words)
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


def run_front_end(*words: object) -> int:
    spec = importlib.util.spec_from_file_location("generate_front_end", ROOT / "launch" / "generate.py")
    assert spec is not None and spec.loader is not None
    front_end = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(front_end)
    return int(front_end.main([str(word) for word in words]))
