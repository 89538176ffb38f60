"""DeepSpeed's configuration file, read strictly."""

import json
from pathlib import Path

import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.deepspeed.config import compute_dtype, resolve_ds_config, zero_stage
from mlpmem_ds.engines.deepspeed.library import import_deepspeed, import_part

REPOSITORY = Path(__file__).resolve().parents[3]
SHIPPED = sorted(path for path in (REPOSITORY / "ds_configs").glob("*.json"))


def resolve(path, *, batch=2048, world_size=2, max_micro_batch=8192, gradient_clipping=0.5):
    return resolve_ds_config(
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
        "zero3_hpz",
        "zero3_nvme",
        "zero3_offload",
    ]


def test_shards_inside_a_node_need_whole_nodes():
    path = next(path for path in SHIPPED if path.stem == "zero3_hpz")
    assert resolve(path, world_size=4, batch=2048)  # less than a node
    assert resolve(path, world_size=16, batch=2048)
    with pytest.raises(UserError, match="zero_hpz_partition_size 8 does not divide .* 12 ranks"):
        resolve(path, world_size=12, batch=2400)


@pytest.mark.parametrize(
    ("zero", "world_size", "size"),
    [('"8"', 16, 8), ("8.0", 16, 8), ("0", 12, 0), ("1", 12, 1)],
)
def test_sizes_of_nodes_are_read_as_deepspeed_reads_them(tmp_path, zero, world_size, size):
    path = tmp_path / "config.json"
    path.write_text(f'{{"zero_optimization": {{"stage": 3, "zero_hpz_partition_size": {zero}}}}}')
    config = resolve(path, world_size=world_size, batch=2400)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == size
    path.write_text('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "8"}}')
    with pytest.raises(UserError, match="zero_hpz_partition_size 8 does not divide .* 12 ranks"):
        resolve(path, world_size=12, batch=2400)


@pytest.mark.parametrize(
    ("text", "dtype", "stage"),
    [
        ('{"bf16": {"enabled": "false"}}', torch.float32, 0),
        ('{"bf16": {"enabled": 0}, "zero_optimization": {"stage": "2"}}', torch.float32, 2),
        ('{"bf16": {"enabled": "on"}, "zero_optimization": {"stage": true}}', torch.bfloat16, 1),
        ('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 3}}', torch.bfloat16, 3),
    ],
)
def test_values_are_what_deepspeed_takes_them_for(tmp_path, text, dtype, stage):
    path = tmp_path / "config.json"
    path.write_text(text)
    config = resolve(path)
    assert (compute_dtype(config), zero_stage(config)) == (dtype, stage)


def test_deepspeed_reads_a_resolved_file_as_it_reads_the_file(tmp_path):
    """Ours are its values, so what it makes of them must be what it makes of the file."""
    import_deepspeed()
    model = import_part("runtime.zero.config").DeepSpeedZeroConfig
    path = tmp_path / "config.json"
    for shipped in SHIPPED:
        if shipped.stem != "zero3_nvme":
            section = json.loads(shipped.read_text()).get("zero_optimization", {})
            assert model(**resolve(shipped).get("zero_optimization", {})) == model(**section)
    former = {"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": False}
    path.write_text(json.dumps({"zero_optimization": former}))
    resolved = resolve(path)["zero_optimization"]
    assert resolved["offload_optimizer"]["device"] == "cpu"
    assert model(**resolved).offload_optimizer == model(**former).offload_optimizer


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
        ("[" * 100_000, "mend it, or choose one of ds_configs/"),
        ('{"train_batch_size": ' + "9" * 5_000 + "}", "mend it, or choose one of ds_configs/"),
        ("[]", "must hold a JSON object"),
        ('{"zero_optimizaton": {}}', "did you mean 'zero_optimization'"),
        ('{"zzz_typo": 1}', "known are"),
        ('{"optimizer": {"type": "Adam"}}', "--learning-rate"),
        ('{"fp16": {"enabled": true}}', "use bf16"),
        ('{"nebula": {}}', "remove it"),
        ('{"managed_gradient_accumulation": false}', "remove it: the trainer decides where a step ends"),
        ('{"managed_gradient_accumulation": null}', "remove it: the trainer decides where a step ends"),
        ('{"checkpoint": {"load_universal": true}}', "remove it: checkpoints of another stage or number"),
        ('{"checkpoint": true}', "checkpoint must be an object"),
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


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "marked.json").write_text(SHIPPED[0].read_text(), encoding="utf-8-sig")
    assert resolve(tmp_path / "marked.json") == resolve(SHIPPED[0])


def test_missing_file_and_uneven_batch(tmp_path):
    with pytest.raises(UserError, match="ds_configs/"):
        resolve(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="cannot be read .*: choose one of ds_configs/"):
        resolve(tmp_path)
    with pytest.raises(UserError, match="such as 2,049"):
        resolve(SHIPPED[0], batch=2048, world_size=3)


def test_no_clipping_is_said_to_deepspeed_too():
    """Its own default is a norm of 1."""
    assert resolve(SHIPPED[0], gradient_clipping=None)["gradient_clipping"] == 0.0


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
        ('{"zero_optimization": {"stage": 2, "round_robin_gradients": "true"}}', "mixes up the weights"),
        ('{"bf16": {"enabled": "on"}}', "no float32 weights .*: give zero_optimization.stage 1"),
        ('{"bf16": {"enabled": 1}, "zero_optimization": {"stage": "0"}}', "or set bf16.enabled to false"),
        ('{"data_types": "fp32"}', "data_types must be an object"),
        (
            '{"data_types": {"grad_accum_dtype": "fp23"}}',
            "grad_accum_dtype is 'fp23': give one of fp32, bf16",
        ),
        ('{"data_types": {"grad_accum_dtype": "bf16"}}', "'bf16' at ZeRO stage 0, where .*: remove it"),
        (
            '{"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "int8"}}',
            "is 'int8': give",
        ),
        ('{"communication_data_type": 32}', "communication_data_type is 32: give one of fp32"),
        (
            '{"zero_optimization": {"stage": 3}, "data_types": {"grad_accum_dtype": "bfloat16"},'
            ' "communication_data_type": "FP32"}',
            None,
        ),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": null}}', None),
        ('{"zero_optimization": {"stage": 3, "round_robin_gradients": true}}', None),
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
