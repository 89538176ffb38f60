"""Checkpoints on disk: published whole, verified, kept and removed; trained weights written and read back."""

from dataclasses import dataclass

import pytest
import torch

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.checkpoint import (
    checkpoint_name,
    fault_of_checkpoint,
    list_checkpoints,
    publish_checkpoint,
    read_checkpoint,
    read_weights,
    record_and_flush,
    remove_old_checkpoints,
    remove_unfinished,
    set_aside,
    write_weights,
)


def publish(root, step):
    directory = root / f"{checkpoint_name(step)}.tmp"
    (directory / "inner").mkdir(parents=True)
    names = ["b.pt", "inner/a.pt"]
    for name in names:
        (directory / name).write_bytes(bytes([step]) * 100)
    return publish_checkpoint(root, step, {"world": 2, "zero_stage": 3}, record_and_flush(directory, names))


def test_a_published_checkpoint_verifies_and_is_the_latest(tmp_path):
    root = tmp_path / "checkpoints"
    path = publish(root, 7)
    assert path == root / "step-00000007" and not list(root.glob("*.tmp"))
    assert fault_of_checkpoint(path) is None
    checkpoint = read_checkpoint(path)
    assert (checkpoint.step, checkpoint.manifest["world"]) == (7, 2)
    assert [record.name for record in checkpoint.files] == ["b.pt", "inner/a.pt"]
    assert read_json(tmp_path / "latest.json") == {"step": 7}


def test_each_rank_sees_the_faults_of_its_share(tmp_path):
    path = publish(tmp_path / "checkpoints", 1)
    content = bytearray((path / "inner" / "a.pt").read_bytes())
    content[50] ^= 1
    (path / "inner" / "a.pt").write_bytes(content)
    assert "checksum" in fault_of_checkpoint(path)
    assert fault_of_checkpoint(path, rank=0, size=2) is None
    assert "inner/a.pt" in fault_of_checkpoint(path, rank=1, size=2)


@pytest.mark.parametrize("manifest", [None, "{", "{}", '{"format": "mlpmem-checkpoint", "version": 2}', "[]"])
def test_a_damaged_manifest_is_a_fault(tmp_path, manifest):
    path = publish(tmp_path / "checkpoints", 1)
    if manifest is None:
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text(manifest)
    assert fault_of_checkpoint(path) is not None
    with pytest.raises(DamagedDataError):
        read_checkpoint(path)


def test_the_oldest_go_and_the_same_step_is_replaced(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2, 10, 10):
        publish(root, step)
    (root / "step-00000011.tmp").mkdir()
    remove_old_checkpoints(root, 2)
    remove_unfinished(root)
    assert [path.name for path in list_checkpoints(root)] == ["step-00000010", "step-00000002"]
    aside = set_aside(root / "step-00000010")
    assert aside.name == "step-00000010.damaged" and len(list_checkpoints(root)) == 1
    assert len(list(root.iterdir())) == 2


def test_weights_round_trip(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Nothing:
        pass

    weights = {"head.weight": torch.randn(5, 3), "final_norm.bias": torch.randn(3)}
    directory = open_stage(
        tmp_path / "memory", stage="memory", version=1, config=Nothing(), inputs={}, world=World()
    )
    with pytest.raises(UserError, match="not complete"):
        read_weights(tmp_path / "memory")
    directory.run_units(
        ["weights"],
        lambda unit, writer: write_weights(
            writer,
            {name: tensor.t().t() for name, tensor in weights.items()},
            memory={"vocab_size": 5},
            provenance={"base": "b"},
        ),
    )
    directory.finish(["weights"], lambda: {})
    trained = read_weights(tmp_path / "memory")
    assert trained.memory == {"vocab_size": 5} and trained.provenance == {"base": "b"}
    assert all(torch.equal(trained.weights[name], tensor) for name, tensor in weights.items())
    path = tmp_path / "memory" / "weights" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 8 + content[8:])
    with pytest.raises(DamagedDataError, match="last checkpoint"):
        read_weights(tmp_path / "memory")
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedDataError, match="bytes where its record says"):
        read_weights(tmp_path / "memory")
