"""A gate directory, written and read back; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlpmem_ds.core.config import Flags
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.gates import (
    GateManifest,
    GateMemory,
    GateText,
    WeightFigures,
    read_gate,
    write_gate_weights,
)
from mlpmem_ds.models.gates import HistoryGate

FIGURES = WeightFigures(means=(0.25,), mean=0.25, quantiles=(0.0, 0.1, 0.2, 0.4, 0.9))


def a_manifest(gate: HistoryGate) -> GateManifest:
    text = GateText(
        corpus="c" * 64,
        name="corpus",
        split="tuning",
        part="domain",
        documents=7,
        positions=900,
        stopping_positions=400,
        base_ppl=12.5,
        memory_ppl=(20.0,),
        fixed_ppl=11.0,
        own_fixed_ppl=10.5,
        own_fixed=(0.4,),
        gate_ppl=10.0,
        weights=FIGURES,
    )
    return GateManifest(
        base="b" * 64,
        vocabulary_sha256="v" * 64,
        memories=(GateMemory(name="memory", sha256="m" * 64),),
        gate=gate.settings(),
        fixed=(0.3,),
        epochs=9,
        best_epoch=4,
        texts=(text,),
    )


def write(root: Path, gate: HistoryGate) -> None:
    directory = open_stage(root, stage="gate", version=1, config=Flags(), inputs={}, world=World())
    directory.run_units(["gate"], lambda _, writer: write_gate_weights(writer, gate.state_dict()))
    directory.complete(["gate"], lambda: a_manifest(gate))


def test_a_gate_is_read_as_it_was_written(tmp_path: Path) -> None:
    gate = HistoryGate(lmbdas=(0.3,))
    with pytest.raises(UserError, match="--gate .*fit_gate"):
        read_gate(tmp_path / "gate")
    write(tmp_path / "gate", gate)
    stored = read_gate(tmp_path / "gate")
    assert stored.manifest == a_manifest(gate)
    assert stored.weights.keys() == gate.state_dict().keys()
    assert all(torch.equal(stored.weights[name], value) for name, value in gate.state_dict().items())

    path = tmp_path / "gate" / "gate.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedDataError, match=r"gate\.safetensors"):
        read_gate(tmp_path / "gate")
