"""Trained weights are written and read back; what is damaged or of another version is refused."""

import pytest
import torch

from mlpmem_ds.core.config import Flags
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.trained_models import (
    MemoryManifest,
    TrainingResult,
    read_memory_description,
    read_weights,
    write_weights,
)

from ..manifests import make_provenance


def open_memory(root):
    return open_stage(
        root,
        stage=MemoryManifest.FORMAT,
        version=MemoryManifest.VERSION,
        config=Flags(),
        inputs={},
        world=World(),
    )


def test_the_positions_read_are_those_of_the_steps_done(tmp_path):
    """Of a training that ended early, too; not known where it started from a memory, which read others."""
    provenance = make_provenance(steps=20, batch_positions=96)
    result = TrainingResult(steps=3, rows_per_step=96, selected_step=2, validations=())
    directory = open_memory(tmp_path / "memory")
    weights, shape = {"head.weight": torch.randn(5, 3)}, {"vocab_size": 5}
    directory.run_units(
        ["weights"],
        lambda _, writer: write_weights(writer, weights, memory=shape, provenance=provenance),
    )
    manifest = MemoryManifest(memory=shape, provenance=provenance, training=result)
    directory.complete(["weights"], lambda: manifest)
    done = read_weights(tmp_path / "memory").provenance
    assert (done.steps, done.steps_planned, done.num_positions_read) == (3, 20, 3 * 96)
    assert provenance.num_positions_read == 20 * 96
    started = make_provenance(steps=20, batch_positions=96, init_from="a" * 64)
    assert started.num_positions_read is None


def test_a_training_is_past_its_best_where_a_validation_before_its_last_step_was_the_best() -> None:
    def training(*perplexities: float | None) -> TrainingResult:
        steps = range(10, 10 * len(perplexities) + 1, 10)
        validations = [
            {"step": step, "perplexity": ppl} for step, ppl in zip(steps, perplexities, strict=True)
        ]
        return TrainingResult(steps=30, rows_per_step=8, selected_step=30, validations=tuple(validations))

    assert training(9.0, 8.0, 8.5).is_past_best is True
    assert training(9.0, 8.0, 8.0).is_past_best is True
    assert training(9.0, None, 7.0).is_past_best is False
    assert training().is_past_best is training(None).is_past_best is None


def test_weights_round_trip(tmp_path):
    provenance = make_provenance(steps=3, alpha=0.5)
    weights = {"head.weight": torch.randn(5, 3), "final_norm.bias": torch.randn(3)}
    directory = open_memory(tmp_path / "memory")
    with pytest.raises(UserError, match="not complete"):
        read_weights(tmp_path / "memory")
    directory.run_units(
        ["weights"],
        lambda unit, writer: write_weights(
            writer,
            {name: tensor.t().t() for name, tensor in weights.items()},
            memory={"vocab_size": 5},
            provenance=provenance,
        ),
    )
    manifest = MemoryManifest(memory={"vocab_size": 5}, provenance=provenance, training=None)
    directory.complete(["weights"], lambda: manifest)
    trained = read_weights(tmp_path / "memory")
    assert trained.memory == {"vocab_size": 5} and trained.provenance == provenance
    assert all(torch.equal(trained.weights[name], tensor) for name, tensor in weights.items())
    path = tmp_path / "memory" / "weights" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 8 + content[8:])
    with pytest.raises(DamagedDataError, match="checksum.*last checkpoint"):
        read_weights(tmp_path / "memory")
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 16]) + content[-2:])
    with pytest.raises(DamagedDataError, match="model.safetensors .*checksum"):
        read_weights(tmp_path / "memory")
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedDataError, match="bytes where its record says"):
        read_weights(tmp_path / "memory")
    description = tmp_path / "memory" / "weights" / "config.json"
    for change, words in (
        ({"version": "2"}, "version is '2'"),
        ({"format": "other"}, "format is 'other', not one of mlpmem-memory"),
        ({"layer": 3}, "unknown key layer"),
    ):
        publish_json(tmp_path / "config.json", {**read_json(description), **change})
        with pytest.raises(DamagedDataError, match=words):
            read_memory_description(tmp_path / "config.json")
