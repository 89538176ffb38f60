"""kill -9 at random moments, on one, two and three ranks, and full disks; the same command then gives the
undisturbed bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlpmem_ds.core import files
from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.corpus import prepare_corpus
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.keys import extract_keys


def result_of(root: Path) -> dict[str, str]:
    """Every file but the two for people, hidden ones too: a killed process must leave nothing behind."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }


def stage_of(
    name: str, text_dir: Path, corpus_dir: Path, base_dir: Path, keys_dir: Path, output: Path
) -> Any:
    if name == "prepare_corpus":
        return prepare_corpus.run, prepare_corpus.Config(
            input=(str(text_dir),), tokenizer="train:300", output=output, block_size=32, stride=16
        )
    if name == "build_index":
        return build_index.run, build_index.Config(
            keys=keys_dir, output=output, num_shards=3, factory="IVF4,PQ4x4"
        )
    codec: Any = name.removeprefix("extract_keys ")
    return extract_keys.run, extract_keys.Config(
        model=str(base_dir), corpus=corpus_dir, output=output, codec=codec, unit_positions=128
    )


@pytest.mark.parametrize(
    ("name", "ranks", "kills"),
    [
        ("extract_keys int8", 1, 7),
        ("extract_keys int8", 2, 7),
        ("extract_keys int8", 3, 7),
        ("extract_keys raw", 2, 2),
        ("prepare_corpus", 2, 3),
        ("build_index", 2, 3),
    ],
)
def test_killed_at_random_and_run_again_is_undisturbed(
    name: str,
    ranks: int,
    kills: int,
    text_dir: Path,
    corpus_dir: Path,
    base_dir: Path,
    keys_dir: Path,
    tmp_path: Path,
    killed_runs: Callable[..., int],
) -> None:
    output = tmp_path / "out"
    run, config = stage_of(name, text_dir, corpus_dir, base_dir, keys_dir, output)
    undisturbed = tmp_path / "out-undisturbed"

    def check(completed: Path) -> None:
        manifest = json.loads((completed / "manifest.json").read_text())
        assert manifest == json.loads((undisturbed / "manifest.json").read_text())
        for file in manifest["files"]:
            assert hashlib.sha256((completed / file["name"]).read_bytes()).hexdigest() == file["sha256"]

    assert killed_runs(run, config, ranks=ranks, kills=kills, seed=ranks, check=check) == kills
    check(output)
    assert result_of(output) == result_of(undisturbed)


def extract(base_dir: Path, corpus_dir: Path, output: Path) -> int:
    words = ["--model", base_dir, "--corpus", corpus_dir, "--output", output, "--unit-positions", "256"]
    return run_front_end(extract_keys.Config, extract_keys.run, argv=list(map(str, words)))


@pytest.mark.parametrize("room", [0, 3, 6, 11, 20])
def test_a_disk_that_fills_up_in_mid_run(
    room: int,
    base_dir: Path,
    corpus_dir: Path,
    keys_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The flush of a file is where a delayed write fails: exit code 2, whole files only; with room again it
    finishes."""
    real, flushed = files.flush, []

    def flush(path: Path) -> None:
        if path.is_file():
            flushed.append(path)
            if len(flushed) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path)

    output, whole = tmp_path / "out", result_of(keys_dir)
    monkeypatch.setattr(files, "flush", flush)
    assert extract(base_dir, corpus_dir, output) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert result_of(output).items() <= whole.items() and not (output / "manifest.json").exists()
    monkeypatch.setattr(files, "flush", real)
    assert extract(base_dir, corpus_dir, output) == 0
    assert result_of(output) == whole


def test_a_real_disk_that_fills_up(
    base_dir: Path, corpus_dir: Path, keys_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("may not mount a file system")
    try:
        (disk / "ballast").write_bytes(bytes(900_000))
        # The check before the start would refuse: it is told that all is there, as if others had filled the
        # disk since.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
            assert extract(base_dir, corpus_dir, disk / "out") == 2
        assert "No space left on device" in capsys.readouterr().err
        left = {path.name for path in (disk / "out").rglob("*") if path.name.startswith(".")}
        assert left == set() and not (disk / "out" / "manifest.json").exists()
        (disk / "ballast").unlink()
        assert extract(base_dir, corpus_dir, disk / "out") == 0
        assert result_of(disk / "out") == result_of(keys_dir)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_output_that_cannot_be_written(
    base_dir: Path, corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert extract(base_dir, corpus_dir, tmp_path / "file" / "out") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
