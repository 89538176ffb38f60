"""DeepSpeed's configuration file, read strictly; where ranks meet; models as stage 3 makes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines import deepspeed as engine

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path for path in (REPOSITORY / "ds_configs").glob("*.json"))


def resolve(path, *, batch=2048, world_size=2, max_micro_batch=8192, gradient_clipping=0.5):
    return engine.resolve_ds_config(
        path,
        batch=batch,
        batch_flag="--batch-positions",
        world_size=world_size,
        max_micro_batch=max_micro_batch,
        gradient_clipping=gradient_clipping,
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_resolve(path):
    if path.stem == "zero3_nvme":
        with pytest.raises(UserError, match="libaio|nvme_path"):
            resolve(path)
        return
    config = resolve(path)
    assert config["train_batch_size"] == 2048
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 2048
    assert config["gradient_clipping"] == 0.5 and "auto" not in json.dumps(config)


def test_every_shipped_file_is_there():
    assert [path.stem for path in SHIPPED] == [
        "cpu",
        "zero1",
        "zero2",
        "zero3",
        "zero3_nvme",
        "zero3_offload",
    ]


@pytest.mark.parametrize(
    "batch, world_size, cap, micro, accumulation",
    [
        (2048, 1, 8192, 2048, 1),
        (2048, 2, 300, 256, 4),
        (60, 3, 7, 5, 4),
        (7, 1, 6, 1, 7),
        (12, 2, 1, 1, 6),
    ],
)
def test_micro_batch_is_the_largest_divisor_below_the_bound(batch, world_size, cap, micro, accumulation):
    config = resolve(SHIPPED[0], batch=batch, world_size=world_size, max_micro_batch=cap)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (
        micro,
        accumulation,
    )


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "not a JSON file"),
        ("[]", "must hold a JSON object"),
        ('{"zero_optimization": {}}', "did you mean 'zero_optimization'"),
        ('{"zzz_typo": 1}', "known are"),
        ('{"optimizer": {"type": "Adam"}}', "--learning-rate"),
        ('{"fp16": {"enabled": true}}', "use bf16"),
        ('{"nebula": {}}', "remove it"),
        ('{"zero_optimization": {"mics_shard_size": 2}}', "no longer has MiCS"),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization is not valid"),
        ('{"zero_optimization": {"stage3_prefetch_bukket_size": 7}}', "stage3_prefetch_bukket_size"),
        (
            '{"zero_optimization": {"reduce_bucket_size": "auto"}}',
            'zero_optimization.reduce_bucket_size is "auto"',
        ),
        ('{"zero_optimization": 3}', "must be an object"),
        ('{"train_micro_batch_size_per_gpu": 1000}', "does not divide a rank's 1,024"),
        ('{"gradient_accumulation_steps": 3}', "makes it 1"),
        ('{"train_batch_size": 4096}', "makes it 2,048"),
    ],
)
def test_wrong_files_are_refused_with_a_remedy(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        resolve(path)
    assert said in str(error.value)


def test_missing_file_and_uneven_batch(tmp_path):
    with pytest.raises(UserError, match="ds_configs/"):
        resolve(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="such as 2,049"):
        resolve(SHIPPED[0], batch=2048, world_size=3)


def test_numbers_that_fit_are_taken(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 256, "gradient_clipping": 0.5}')
    config = resolve(path)
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (4, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"gradient_clipping": 0.0}', "gradient_clipping is 0.0, but --gradient-clipping is 0.5"),
        ('{"bf16": {"enabeld": true}}', "bf16 is not valid"),
        ('{"bf16": true}', "bf16 must be an object"),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": null}}', None),
    ],
)
def test_sections_are_checked_before_anything_is_written(tmp_path, text, said):
    path = tmp_path / "config.json"
    path.write_text(text)
    if said is None:
        assert resolve(path)["zero_optimization"]["stage"] == 3
        return
    with pytest.raises(UserError, match=said):
        resolve(path)


def test_ranks_agree_where_to_meet():
    world = World(rank=1, size=2, local_rank=1)
    one_host = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "job@1"}
    assert engine.meeting_point(world, one_host) == engine.meeting_point(World(rank=0, size=2), one_host)
    assert engine.meeting_point(world, {"MASTER_ADDR": "there", "MASTER_PORT": "7"}) == ("there", 7)
    assert engine.meeting_point(World(), {})[0] == "127.0.0.1"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        engine.meeting_point(world, {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from mlpmem_ds.core.world import World
from mlpmem_ds.engines import deepspeed as engine
from mlpmem_ds.models.memory import MemoryConfig
from mlpmem_ds.models.objective import MemoryObjective
engine.set_up_distributed(World())
memory = MemoryConfig(input_size=48, hidden_size=64, intermediate_size=256, num_blocks=2, vocab_size=500)
for name, file in json.loads(sys.argv[1]).items():
    def start_head(model):
        engine.set_parameter(model.final_norm.bias, torch.full((64,), 0.5))
    config = engine.resolve_ds_config(Path(file), batch=4, batch_flag="--b", world_size=1, max_micro_batch=4,
                                      gradient_clipping=1.0)
    built = engine.build_engine(lambda: MemoryObjective(memory, alpha=0.5), config=config,
        settings=engine.AdamWSettings(),
                                seed=3, world=World(), prepare=start_head)
    torch.save(built.whole_weights(), sys.argv[2] + "/" + name + ".pt")
"""


def test_initial_weights_are_right_at_every_stage(tmp_path):
    """zero.Init cuts a parameter as soon as its module is made: an initialization from outside would miss
    it."""
    files = {}
    for stage, bf16 in ((0, False), (2, True), (3, False), (3, True)):
        path = tmp_path / f"stage{stage}{bf16}.json"
        path.write_text(
            json.dumps(
                {
                    "bf16": {"enabled": bf16},
                    "zero_allow_untested_optimizer": True,
                    "zero_optimization": {"stage": stage},
                }
            )
        )
        files[path.stem] = str(path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    (tmp_path / "script.py").write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), json.dumps(files), str(tmp_path)],
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
