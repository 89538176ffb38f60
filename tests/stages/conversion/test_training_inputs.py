"""What a memory was trained from: found by the flags or by the run's layout, and only if it is the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.stages.conversion.training_inputs import input_of_training, model_of_keys

from .conftest import MemoryFlags, save_memory


def test_an_input_is_found_where_the_flags_name_it_and_next_to_the_memory(
    memory_dir: Path, flags: MemoryFlags, tmp_path: Path
) -> None:
    sha256 = read_weights(memory_dir).provenance.corpus
    assert input_of_training(memory_dir, "corpus", sha256) == flags.corpus
    moved = shutil.copytree(memory_dir, tmp_path / "memory")
    (moved / "run.json").unlink()
    assert input_of_training(moved, "corpus", sha256) is None
    shutil.copytree(flags.corpus, tmp_path / "corpus")
    assert input_of_training(moved, "corpus", sha256) == tmp_path / "corpus"


def test_another_directory_of_that_name_is_not_taken(memory_dir: Path) -> None:
    assert input_of_training(memory_dir, "corpus", "0" * 64) is None
    assert input_of_training(memory_dir, "corpus", None) is None


def test_the_keys_name_the_base_and_without_them_the_flag_is_needed(
    memory_dir: Path, flags: MemoryFlags, tmp_path: Path
) -> None:
    model = read_json(flags.keys / "run.json")["config"]["model"]
    assert model_of_keys(memory_dir, read_weights(memory_dir)) == model
    lonely = save_memory(tmp_path / "lonely", flags, keys="0" * 64)
    with pytest.raises(UserError, match="--model is needed"):
        model_of_keys(lonely, read_weights(lonely))
