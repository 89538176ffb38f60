"""The base of a memory: its keys are found, and name it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.stages.conversion.training_inputs import model_of_keys

from .conftest import MemoryFlags, save_memory


def test_the_keys_name_the_base_and_without_them_the_flag_is_needed(
    memory_dir: Path, flags: MemoryFlags, tmp_path: Path
) -> None:
    model = read_json(flags.keys / "run.json")["config"]["model"]
    assert model_of_keys(memory_dir, read_weights(memory_dir)) == model
    lonely = save_memory(tmp_path / "lonely", flags, keys="0" * 64)
    with pytest.raises(UserError, match="--model is needed"):
        model_of_keys(lonely, read_weights(lonely))
