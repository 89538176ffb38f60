"""Models as the engine makes them, at every ZeRO stage."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mlpmem_ds.core.files import FileRecord
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed import engine
from mlpmem_ds.engines.deepspeed.engine import AdamWSettings, Engine, build_engine
from mlpmem_ds.formats.checkpoint import Checkpoint, bytes_of_parameter

from ...manifests import checkpoint_manifest

REPOSITORY = Path(__file__).resolve().parents[3]

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.config import resolve_ds_config
from mlpmem_ds.engines.deepspeed.engine import AdamWSettings, build_engine
from mlpmem_ds.engines.deepspeed.process_group import set_up_distributed
from mlpmem_ds.engines.deepspeed.zero_state import set_parameter
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.objective import MemoryWithLoss
set_up_distributed(World())
memory = MemoryConfig(input_size=48, hidden_size=64, intermediate_size=256, num_blocks=2, vocab_size=500)
for name, file in json.loads(sys.argv[1]).items():
    def start_head(model):
        set_parameter(model.final_norm.bias, lambda: torch.full((64,), 0.5), World())
    config = resolve_ds_config(Path(file), batch=4, batch_flag="--b", world_size=1, max_micro_batch=4,
                               gradient_clipping=1.0)
    built = build_engine(lambda: MemoryWithLoss(memory, alpha=0.5), config=config, settings=AdamWSettings(),
                         seed=3, world=World(), prepare=start_head)
    torch.save(built.write_weights(Path(sys.argv[2]), name).read(), sys.argv[2] + "/" + name + ".pt")
"""


def test_initial_weights_are_right_at_every_stage(tmp_path, forked_commands):
    """zero.Init cuts a parameter as soon as its module is made: an initialization from outside would miss
    it."""
    files = {}
    for stage, bf16, zero in (
        (0, False, {}),
        (2, True, {}),
        (3, False, {"offload_optimizer": None}),
        (3, True, {}),
    ):
        path = tmp_path / f"stage{stage}{bf16}.json"
        path.write_text(
            json.dumps(
                {
                    "bf16": {"enabled": bf16},
                    "zero_allow_untested_optimizer": True,
                    "zero_optimization": {"stage": stage, **zero},
                }
            )
        )
        files[path.stem] = str(path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    (tmp_path / "script.py").write_text(SCRIPT)
    result = subprocess.run(
        [forked_commands / "python", str(tmp_path / "script.py"), json.dumps(files), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    weights = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in files}
    for name, tensors in weights.items():
        for key, tensor in tensors.items():
            assert tensor.dtype == torch.float32 and tensor.shape == weights["stage0False"][key].shape
            if key == "final_norm.bias":  # what `prepare` wrote
                assert torch.equal(tensor, torch.full((64,), 0.5)), name
            elif key.endswith("bias"):
                assert not tensor.any(), (name, key)
            elif "norm" in key:
                assert torch.equal(tensor, torch.ones_like(tensor)), (name, key)
            else:
                expected = 0.02 / 2 if "down" in key else 0.02
                assert tensor.std().item() == pytest.approx(expected, rel=0.05), (name, key)
    for key, tensor in weights["stage0False"].items():
        assert torch.equal(tensor, weights["stage3False"][key]), key


CHECKPOINTS = """
import json, sys
from pathlib import Path
import torch
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.config import resolve_ds_config
from mlpmem_ds.engines.deepspeed.engine import AdamWSettings, build_engine
from mlpmem_ds.engines.deepspeed.process_group import set_up_distributed
set_up_distributed(World())
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1000, 1500), 0.1))
    def forward(self, inputs):
        return ((inputs.to(self.weight.dtype) @ self.weight).float().square().mean(),)
for name in json.loads(sys.argv[1]):
    config = resolve_ds_config(ds_configs() / f"{name}.json", batch=4, batch_flag="--b", world_size=1,
                               max_micro_batch=4, gradient_clipping=1.0)
    built = build_engine(Model, config=config, settings=AdamWSettings(), seed=3, world=World())
    built.train_step([(torch.ones(4, 1000),)], 0.001)
    built.save(Path(sys.argv[2]) / name, 1, subject={}, values={}, keep=1)
"""


def test_a_checkpoint_takes_as_many_bytes_as_are_asked_of_the_disk(tmp_path, forked_commands):
    expected = {"zero1": (2, 1), "zero2": (2, 2), "cpu": (4, 2), "zero3": (2, 3)}
    (tmp_path / "script.py").write_text(CHECKPOINTS)
    result = subprocess.run(
        [forked_commands / "python", str(tmp_path / "script.py"), json.dumps([*expected]), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    for name, (weight_bytes, stage) in expected.items():
        found = sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())
        each = bytes_of_parameter(weight_bytes, zero_stage=stage)
        assert found / 1_500_000 == pytest.approx(each, rel=0.02), name


def test_a_whole_model_is_made_on_the_device_that_computes(monkeypatch):
    """Not in the memory of the host, which the ranks of its GPUs share."""
    monkeypatch.setattr(engine, "device_of_rank", lambda *_: torch.device("meta"))

    class MadeError(Exception):
        pass

    def make():
        raise MadeError(torch.nn.Linear(3, 4).weight.device)

    for stage in (0, 1, 2):
        with pytest.raises(MadeError, match="meta"):
            config = {"zero_optimization": {"stage": stage}}
            build_engine(make, config=config, settings=AdamWSettings(), seed=0, world=World())


def test_every_file_that_is_unpickled_is_looked_at_where_listings_are_stale(tmp_path, monkeypatch):
    """By one of the ranks: shares of two listings, of which one is old, would leave files out."""
    names = ["a.pt", "inside/b.pt", "c.pt", "notes.txt"]
    files = tuple(FileRecord(name=name, bytes=1, sha256="0" * 64) for name in names)
    checkpoint = Checkpoint(path=tmp_path, manifest=checkpoint_manifest(world=2, zero_stage=2, files=files))
    looked_at = []
    monkeypatch.setattr(engine, "refuse_foreign_code", looked_at.extend)
    monkeypatch.setattr(Engine, "_takes_groups_of", lambda *_: True)
    monkeypatch.setattr(engine, "gather_values", lambda value, world: [value])
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: iter(()))
    for rank in range(2):
        inner = SimpleNamespace(device="cpu", load_checkpoint=lambda *_, **__: ("there", {}))
        config = {"zero_optimization": {"stage": 2}}
        Engine(inner, config, World(rank=rank, size=2))._load(checkpoint)
    assert sorted(looked_at) == sorted(tmp_path / name for name in names[:3])
