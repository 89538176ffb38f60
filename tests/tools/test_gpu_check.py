"""tools/gpu_check.sh from another directory: the package of its checkout, a process for each step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_short_rehearsal(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu_check.sh"), "--rehearse", "--output", "check.json"]
        + ["--only", "machine,twins,assign"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("OK")] == [
        ["OK", "machine"],
        ["OK", "twins"],
        ["OK", "assign"],
    ]
    assert json.loads((tmp_path / "check.json").read_text())["passed"]
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]
