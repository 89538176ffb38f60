"""docs/quickstart.md: its blocks run in their order, and pass mypy as a user's script."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .stages.conversion.conftest import flags, memory_dir  # noqa: F401
from .stages.conversion.test_gate_inputs import save_gate

ROOT = Path(__file__).parents[1]


def _script() -> str:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))


def test_the_blocks_run(
    base_dir: Path,
    corpus_dir: Path,
    memory_dir: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_dir, "run/base")
    shutil.copytree(corpus_dir / "tokenizer", "run/base", dirs_exist_ok=True)
    shutil.copytree(memory_dir, "run/memory")
    save_gate(Path("run/gate"), base_dir, [Path("run/memory")])
    exec(compile(_script(), "quickstart", "exec"), {"__name__": "quickstart"})
    shown = capsys.readouterr().out
    assert "the memory's likeliest:" in shown and "perplexity " in shown
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def test_the_blocks_pass_mypy_as_a_users_script(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(_script(), encoding="utf-8")
    words = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
