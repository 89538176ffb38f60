"""Front-ends in children: their exit code, and what they say in a file."""

from __future__ import annotations

from pathlib import Path

import mlpmem_ds
from mlpmem_ds.benchmarks.quality.children import make_launcher


def test_a_child_leaves_its_exit_code_and_its_words(tmp_path: Path) -> None:
    launch = make_launcher(preloaded=())
    version = launch(["--version"], tmp_path / "version.log", 1)
    unknown = launch(["no-such-command"], tmp_path / "unknown.log", 1)
    assert version.wait(60) and unknown.wait(60)
    assert (version.poll(), unknown.poll()) == (0, 2)
    assert (tmp_path / "version.log").read_text() == f"mlpmem-ds {mlpmem_ds.__version__}\n"
    assert "there is no command 'no-such-command'" in (tmp_path / "unknown.log").read_text()
