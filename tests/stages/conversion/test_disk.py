"""A conversion asks the disk for what it will write, no more and no less, and for nothing when it is done."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.trained_models import read_weights

from .conftest import ROOT, MemoryFlags, convert, save_memory
from .test_faults import KILLED
from .test_import_reference import save_published


@pytest.fixture(scope="module")
def num_weights(export_dir: Path) -> int:
    """Numbers in the joint model; tied ones are stored once."""
    parts = [load_file(path) for path in export_dir.glob("*.safetensors")]
    return sum(tensor.numel() for part in parts for tensor in part.values())


@pytest.mark.parametrize("stored", ["float32", "float32 twice", "bfloat16"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_an_export_needs_the_bytes_of_its_own_tensors(
    stored: str,
    dtype: str,
    size: int,
    num_weights: int,
    flags: MemoryFlags,
    base_dir: Path,
    corpus_dir: Path,
    tmp_path: Path,
    set_free_bytes: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In whatever form the base is stored."""
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    if stored == "float32 twice":
        shutil.copyfile(base / "model.safetensors", base / "pytorch_model.bin")
    elif stored == "bfloat16":
        GPT2LMHeadModel.from_pretrained(base_dir).to(torch.bfloat16).save_pretrained(base)
    memory = save_memory(tmp_path / "memory", flags, base=fingerprint_model(str(base)))
    words = ("--checkpoint", memory, "--model", base, "--tokenizer", corpus_dir / "tokenizer")
    words += ("--output", tmp_path / "out" / "export", "--dtype", dtype)
    set_free_bytes(size * num_weights - 1)
    assert convert(*words) == 2
    assert "the export's weights need" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    set_free_bytes(size * num_weights)
    assert convert(*words) == 0
    set_free_bytes(0)
    assert convert(*words) == 0  # complete


def test_what_killed_runs_have_left_is_not_asked_for_again(
    num_weights: int,
    memory_dir: Path,
    base_dir: Path,
    tmp_path: Path,
    set_free_bytes: Callable[[int], None],
) -> None:
    """Whole shards stay, and the rest is removed before anything is written."""
    words = ["--checkpoint", str(memory_dir), "--model", str(base_dir), "--output", str(tmp_path / "export")]
    words += ["--max-shard-gigabytes", "1e-5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words], cwd=ROOT, env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    files = {path: path.stat().st_size for path in left.rglob("*") if path.is_file()}
    assert sum(path.suffix == ".tmp" for path in files) == 1
    missing = 4 * num_weights - sum(files.values())
    set_free_bytes(missing - 1)
    assert convert(*words) == 2
    assert {path: path.stat().st_size for path in left.rglob("*") if path.is_file()} == files
    set_free_bytes(missing)
    assert convert(*words) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_memory_that_is_written_needs_nothing(
    base_dir: Path,
    corpus_dir: Path,
    tmp_path: Path,
    set_free_bytes: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    published, output = save_published(tmp_path / "published"), tmp_path / "memory"
    words = ("--from-reference", published, "--model", base_dir, "--tokenizer", corpus_dir / "tokenizer")
    words += ("--write", "memory", "--output", output)
    needed = sum(4 * tensor.numel() for tensor in load_file(published / "model.safetensors").values())
    set_free_bytes(needed - 1)
    assert convert(*words) == 2
    assert "the memory's weights need" in capsys.readouterr().err and not output.exists()
    set_free_bytes(needed)
    assert convert(*words) == 0
    set_free_bytes(0)
    assert convert(*words) == 0
    (output / "manifest.json").unlink()  # killed before the end
    assert convert(*words) == 0 and read_weights(output).weights
