"""A memory to start from: one, and which one of several is never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.training.initial_memory import open_initial_memory

SHAPE = MemoryConfig(input_size=8, hidden_size=8, intermediate_size=16, num_blocks=2, vocab_size=30)


def write_export(root: Path, further: list[dict[str, Any]] | None) -> None:
    description = {"model_type": "mlpmem", "memory_config": SHAPE.to_dict(), "further_memories": further}
    publish_json(root / "config.json", description)
    prefixes = ["memory.", *(f"further_memories.{number}." for number in range(len(further or ())))]
    weights = Memory(SHAPE).state_dict()
    tensors = {f"{prefix}{name}": weights[name].clone() for prefix in prefixes for name in weights}
    save_file(tensors, root / "model.safetensors")


@pytest.mark.parametrize("flag", ["--init-from", "--match-memory"])
def test_an_export_of_several_memories_is_refused(tmp_path: Path, flag: str) -> None:
    write_export(tmp_path, [{"memory_config": SHAPE.to_dict()}])
    with pytest.raises(UserError, match=rf"{flag} .* is an export of several memories .a bank.: give the"):
        open_initial_memory(tmp_path, flag=flag)


@pytest.mark.parametrize("further", [[], None])
def test_an_export_of_one_memory_is_opened(tmp_path: Path, further: list[dict[str, Any]] | None) -> None:
    write_export(tmp_path, further)
    initial = open_initial_memory(tmp_path)
    assert initial.memory == SHAPE and initial.names == sorted(Memory(SHAPE).state_dict())
