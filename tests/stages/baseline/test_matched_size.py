"""The size that a baseline is made to match: a memory's, or a number."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.baseline.config import Config
from mlpmem_ds.stages.baseline.matched_size import matched_parameters

SHAPE = MemoryConfig(input_size=8, hidden_size=8, intermediate_size=16, num_blocks=2, vocab_size=30)


def config(tmp_path: Path, **size: object) -> Config:
    return Config(kind="lora", model="m", corpus=tmp_path, output=tmp_path / "out", **size)


def test_a_memory_counts_with_its_head_and_a_number_is_itself(tmp_path: Path) -> None:
    memory = Memory(SHAPE)
    description = {"model_type": "mlpmem", "memory_config": SHAPE.to_dict(), "vocabulary_sha256": ""}
    publish_json(tmp_path / "config.json", description)
    weights = {f"memory.{name}": tensor for name, tensor in memory.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    count = sum(weight.numel() for weight in memory.parameters())
    assert matched_parameters(config(tmp_path, match_memory=tmp_path)) == count == SHAPE.num_parameters()
    assert matched_parameters(config(tmp_path, match_parameters=7)) == 7
    assert matched_parameters(config(tmp_path, rank=2)) is None


def test_a_directory_without_a_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--match-memory .* holds no memory"):
        matched_parameters(config(tmp_path, match_memory=tmp_path))
