"""A fitted gate goes into the export of its own memory, with its numbers, and of no other."""

from __future__ import annotations

from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.gates import GateManifest, GateMemory, write_gate_weights
from mlpmem_ds.models.gates import HistoryGate

from .conftest import IDS, LAMBDA, convert


def save_gate(root: Path, *memories: str) -> HistoryGate:
    """A gate with random weights, as fit_gate leaves it."""
    torch.manual_seed(2)
    gate = HistoryGate(lmbdas=(LAMBDA,) * len(memories))
    torch.nn.init.normal_(gate.out.weight)
    manifest = GateManifest(
        base="b" * 64,
        vocabulary_sha256="v" * 64,
        memories=tuple(GateMemory(name=f"memory{sha256[:2]}", sha256=sha256) for sha256 in memories),
        gate=gate.settings(),
        fixed=(LAMBDA,) * len(memories),
        epochs=1,
        best_epoch=1,
        texts=(),
    )
    config: Any = make_dataclass("NoFlags", [], frozen=True)()
    directory = open_stage(root, stage="gate", version=1, config=config, inputs={}, world=World())
    directory.run_units(["gate"], lambda _, writer: write_gate_weights(writer, gate.state_dict()))
    directory.complete(["gate"], lambda: manifest)
    return gate


@torch.no_grad()
def test_an_export_has_the_gate_of_its_memory(memory_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    gate = save_gate(tmp_path / "gate", sha256_of_file(memory_dir / "manifest.json"))
    words = ["--checkpoint", memory_dir, "--model", base_dir, "--output", tmp_path / "export"]
    assert convert(*words, "--lambda", LAMBDA, "--gate", tmp_path / "gate") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert str(model.gate) == "gate: history" and model.lmbda == LAMBDA
    assert all(torch.equal(model.gate.state_dict()[name], value) for name, value in gate.state_dict().items())
    assert "gate" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    gated_BSV = model(IDS).logits
    model.lmbda = LAMBDA
    assert not torch.allclose(gated_BSV, model(IDS).logits)


@pytest.mark.parametrize(
    ("memories", "words", "said"),
    [
        (["a" * 64], (), "was fitted with other memories (memoryaa)"),
        (["a" * 64, "b" * 64], (), "was fitted with other memories (memoryaa, memorybb)"),
        (["a" * 64], ("--write", "memory"), "--gate belongs into the export"),
    ],
)
def test_a_gate_of_other_memories_is_refused(
    memories: list[str],
    words: tuple[str, ...],
    said: str,
    memory_dir: Path,
    base_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_gate(tmp_path / "gate", *memories)
    given = ["--checkpoint", memory_dir, "--model", base_dir, "--output", tmp_path / "export", *words]
    assert convert(*given, "--gate", tmp_path / "gate") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "export").exists()
