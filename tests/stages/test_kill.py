"""kill -9 of a stage's front-end as soon as its first unit is done; the same command then gives the undisturbed bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def result_of(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill_after_the_first_unit(words: list[str], output: Path) -> bool:
    """Whether the kill came before the end."""
    process = start(words)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not list(output.glob("done/*.json")):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return not (output / "manifest.json").exists()


@pytest.mark.parametrize("stage", ["prepare_corpus", "extract_keys", "build_index"])
def test_killed_and_run_again_is_undisturbed(
    stage: str, text_dir: Path, corpus_dir: Path, base_dir: Path, keys_dir: Path, tmp_path: Path
) -> None:
    flags = {
        "prepare_corpus": ["--input", text_dir, "--tokenizer", "train:300", "--block-size", "32", "--stride", "16"],
        "extract_keys": ["--model", base_dir, "--corpus", corpus_dir, "--unit-positions", "64"],
        "build_index": ["--keys", keys_dir, "--num-shards", "3", "--factory", "IVF4,PQ4x4"],
    }[stage]
    words = [f"tools/{stage}.py", *map(str, flags), "--output"]
    straight = tmp_path / "straight"
    assert start([*words, str(straight)]).wait() == 0
    for attempt in range(5):  # on a busy machine the kill may come too late
        broken = tmp_path / f"broken{attempt}"
        if kill_after_the_first_unit([*words, str(broken)], broken):
            break
    else:
        pytest.fail("five times the stage was done before it could be killed")
    assert start([*words, str(broken)]).wait() == 0
    assert result_of(broken) == result_of(straight)
