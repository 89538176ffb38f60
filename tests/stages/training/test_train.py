"""Training, in real processes: worlds, ZeRO stages, resume, damage, checkpoints as they convert.

A process with DeepSpeed costs 10 s to start: most ranks are forked from one that has it
(tests/stages/forked_training.py), and what mpirun starts runs a list of jobs. torchrun is in
stages/base/test_train_base.py, the deepspeed command in test_launchers.py.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.batches import BatchReader
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.formats.training_order import TrainingOrder
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.pretrained_memory import PretrainedMemory
from mlpmem_ds.stages.conversion.weights import describe_checkpoint, find_checkpoint, with_weights
from mlpmem_ds.stages.training.initial_memory import hash_initial_memory, open_initial_memory

REPOSITORY = Path(__file__).resolve().parents[3]
ZERO1 = str(REPOSITORY / "ds_configs" / "zero1.json")
HALF, STEPS, BATCH = 6, 12, 72  # the first epoch ends in the second half
PARITY = 1e-5  # of float32 losses over all steps, relative
COMPILES_ADAM = os.environ.get("MLPMEM_TEST_COMPILED_ADAM") == "1"
BF16_PARITY = 2e-2  # of bfloat16 losses to float32's
FLAGS = {
    "epochs": 1.45,
    "batch_positions": BATCH,
    "hidden_size": 16,
    "num_blocks": 2,
    "save_every_steps": HALF,
    "keep_checkpoints": 9,
    "log_every_steps": 1,
    "shuffle_window_blocks": 4,
    "micro_batch_positions": BATCH // 2,
    "learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def runs(make_runs, inputs_dir):
    return make_runs({**FLAGS, "corpus": inputs_dir / "corpus", "targets": inputs_dir / "targets"})


@pytest.fixture(scope="module")
def single(runs, inputs_dir):
    """One rank: every stage from one seed, and other flags; what all said."""
    steps = [runs.start(f"one-stage{stage}", stage) for stage in (0, 1, 2, 3)]
    steps += [
        runs.start("one-stopped", 2, signal_at=2),
        runs.start("one-stopped", 2),
        runs.start("one-uneven", 2, targets=inputs_dir / "uneven"),
        runs.start("one-shipped1", ZERO1),
        runs.start("one-from-memory", 3, init_from=runs / "one-stage2"),
    ]
    return "".join(runs.succeed(*steps))


@pytest.fixture(scope="module")
def pair(runs, single):
    """Two ranks: every stage; bf16 ZeRO-3 straight and stopped; the single rank's checkpoints taken over.

    Then copies of these runs, cut short and damaged.
    """
    bf16 = runs.ds_config(3, bf16=True)
    offload = {"offload_optimizer": {"device": "cpu"}}
    runs.rewind("one-stage2", "one2-to-two3", HALF)
    several = {"micro_batch_positions": BATCH // 4}  # micro-batches of each rank
    steps = [runs.start(f"two-stage{stage}", stage, size=2, **several) for stage in (0, 1, 2, 3)]
    steps += [
        runs.start("two-offload", runs.ds_config(3, **offload), size=2),
        runs.start("two-from-weights", 2, init_from=runs / "one-stage2" / "weights", size=2),
        runs.start("one2-to-two3", 3, size=2),
        runs.start("two-bf16", bf16, size=2),
        runs.start("two-shipped1", ZERO1, size=2),
        runs.start("two-in-files", 3, bytes_of_weights=9000, size=2, **several),
        runs.start("two-stopped", bf16, signal_at=2, size=2),
        runs.start("two-stopped", bf16, size=2),
    ]
    if COMPILES_ADAM:
        own_adam = runs.ds_config(3, own_adam=True, **offload)
        steps.append(runs.start("two-offload-adam", own_adam, size=2))
    said = "".join(runs.succeed(*steps))
    runs.rewind("two-bf16", "two-rewound", HALF)
    shutil.copytree(runs / "two-bf16", runs / "two-damaged")
    runs.unfinish("two-damaged")
    checkpoints = runs / "two-damaged" / "checkpoints"
    victim = max((checkpoints / f"step-{STEPS:08d}").glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (checkpoints / f"step-{STEPS + 1:08d}.tmp").mkdir()
    for stage in (1, 2, 3):
        runs.rewind("two-stage3", f"two3-to-one{stage}", HALF)
    runs.rewind("two-stage3", "two3-to-three2", HALF)
    return said


def test_stages_and_worlds_give_the_losses_of_one_process(runs, pair):
    expected = runs.losses("one-stage0")
    assert len(expected) == STEPS and expected[-1] < expected[0]
    names = [f"{world}-stage{stage}" for world in ("one", "two") for stage in (1, 2, 3)]
    names += ["two-offload"] + ["two-offload-adam"] * COMPILES_ADAM
    for name in names:
        np.testing.assert_allclose(runs.losses(name), expected, rtol=PARITY, err_msg=name)
    # The last one by DeepSpeed's optimizer for bf16 at stage 1.
    for name in ("two-bf16", "one-shipped1", "two-shipped1"):
        np.testing.assert_allclose(runs.losses(name), expected, rtol=BF16_PARITY, err_msg=name)


def test_shards_of_uneven_sizes_give_the_same_weights(runs, single):
    runs.assert_same_weights("one-uneven", "one-stage2")


def test_large_weights_lie_in_several_files(runs, pair):
    """Each is written by one rank, and whoever reads a memory reads them all."""
    root = runs / "two-in-files" / "weights"
    files = sorted(path.name for path in root.glob("model*"))
    assert len(files) > 3 and files[-1] == "model.safetensors.index.json"
    manifest = {file["name"] for file in runs.manifest("two-in-files")["files"]}
    assert {f"weights/{name}" for name in files} <= manifest
    assert not (runs / "two-in-files" / ".weights.tmp").exists()
    whole = read_weights(runs / "two-stage3").weights
    parts = read_weights(runs / "two-in-files").weights
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    one, other = (
        open_initial_memory(path) for path in (runs / "two-in-files", runs / "two-stage3" / "weights")
    )
    assert hash_initial_memory(one, World()) == hash_initial_memory(other, World())
    module = PretrainedMemory.from_training(runs / "two-in-files").module
    assert all(torch.equal(tensor, whole[name]) for name, tensor in module.state_dict().items())


def test_weights_load_into_a_plain_memory(runs, pair, inputs_dir):
    keys = open_keys(inputs_dir / "keys")
    memory = Memory(
        MemoryConfig(
            input_size=keys.input_size,
            hidden_size=16,
            intermediate_size=64,
            num_blocks=2,
            vocab_size=keys.manifest.head_size,
        )
    )
    trained = read_weights(runs / "two-stage3")
    memory.load_state_dict(trained.weights)  # names and shapes
    assert trained.memory == memory.config.to_dict()
    assert trained.provenance.base == keys.base_sha256 and trained.provenance.steps == STEPS


def test_a_stopped_run_continues_to_the_same_weights(runs, single, pair):
    assert "stopped as asked" in single and "stopped as asked" in pair
    runs.assert_same_weights("one-stopped", "one-stage2")
    runs.assert_same_weights("two-stopped", "two-bf16")
    np.testing.assert_array_equal(runs.losses("two-stopped"), runs.losses("two-bf16"))


def test_resume_at_another_world_and_stage(runs, pair):
    expected = runs.losses("one-stage0")
    np.testing.assert_allclose(runs.losses("one2-to-two3"), expected, rtol=PARITY)
    *_, said = runs.succeed(
        *(runs.start(f"two3-to-one{stage}", stage) for stage in (1, 2, 3)),
        runs.start("two3-to-three2", 2, size=3),
    )
    assert "of 2 ranks at ZeRO stage 3, this run has 3 at stage 2" in said
    for name in ("two3-to-one1", "two3-to-one2", "two3-to-one3", "two3-to-three2"):
        np.testing.assert_allclose(runs.losses(name), expected, rtol=PARITY, err_msg=name)


def test_resume_and_damage_and_complete(runs, pair, forked_commands):
    """12 steps = 6 + 6 bit for bit, through mpirun; a flipped byte costs the newest checkpoint and nothing
    else."""
    bf16 = runs.ds_config(3, bf16=True)
    steps = [runs.start(name, bf16) for name in ("two-rewound", "two-damaged", "two-bf16")]
    mpirun = [Path(sys.executable).parent / "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    said = runs.launch([*mpirun, forked_commands / "python"], *steps)
    runs.assert_same_weights("two-rewound", "two-bf16")
    np.testing.assert_array_equal(runs.losses("two-rewound"), runs.losses("two-bf16"))
    assert "does not have the checksum" in said and f"step-{STEPS:08d}" in said
    runs.assert_same_weights("two-damaged", "two-bf16")
    assert (runs / "two-damaged" / "checkpoints" / f"step-{STEPS:08d}.damaged").is_dir()
    assert not list((runs / "two-damaged" / "checkpoints").glob("*.tmp"))
    assert said.count("complete: ") == 3


@pytest.mark.parametrize(
    "name",
    [
        *(f"{world}-stage{stage}" for world in ("one", "two") for stage in (0, 1, 2, 3)),
        "two-offload",
        pytest.param(
            "two-offload-adam",
            marks=pytest.mark.skipif(
                not COMPILES_ADAM,
                reason="DeepSpeed compiles its Adam for 1 to 2 minutes: set MLPMEM_TEST_COMPILED_ADAM=1",
            ),
        ),
        "two-bf16",
        "one-shipped1",
        "two-shipped1",
    ],
)
def test_checkpoints_of_every_layout_convert(runs, pair, tmp_path, name):
    """The last step's checkpoint holds the weights that the training wrote; an earlier one holds others."""
    expected = runs.weights(name)
    for step, is_last in ((None, True), (HALF, False)):
        checkpoint = find_checkpoint(runs / name, step)
        converted = with_weights(describe_checkpoint(checkpoint), checkpoint, tmp_path / "out")
        assert converted.provenance.steps == checkpoint.step == (STEPS if is_last else HALF)
        assert converted.provenance.steps_planned == STEPS
        assert converted.weights.keys() == expected.keys()
        is_same = all(torch.equal(tensor, expected[key]) for key, tensor in converted.weights.items())
        assert is_same == is_last
        if is_last:
            memory = Memory(MemoryConfig.from_dict(converted.memory))
            memory.load_state_dict(converted.weights)
            trained = Memory(MemoryConfig.from_dict(converted.memory))
            trained.load_state_dict(expected)
            inputs = torch.randn(9, memory.config.input_size)
            assert (memory.head(memory(inputs)) - trained.head(trained(inputs))).abs().max() <= 1e-6
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_cannot_be_taken(runs, pair, inputs_dir, tmp_path, caplog):
    """A damaged one is passed over, with a warning; what is not there is refused with what is."""
    with pytest.raises(UserError, match=f"has checkpoints of steps {HALF}, {STEPS}"):
        find_checkpoint(runs / "one-stage2", 5)
    with pytest.raises(UserError, match="is one checkpoint: give the training's output"):
        find_checkpoint(runs / "one-stage2" / "checkpoints" / f"step-{STEPS:08d}", None)
    with pytest.raises(UserError, match="is no output directory of launch/train.py"):
        find_checkpoint(inputs_dir / "corpus", None)
    shutil.copytree(runs / "one-stage2", tmp_path / "damaged")
    for step, newest_whole in ((STEPS, HALF), (HALF, None)):
        checkpoint = tmp_path / "damaged" / "checkpoints" / f"step-{step:08d}"
        (checkpoint / "mp_rank_00_model_states.pt").write_bytes(b"")
        if newest_whole is None:
            with pytest.raises(DamagedDataError, match="2 checkpoints are damaged"):
                find_checkpoint(tmp_path / "damaged", None)
        else:
            assert find_checkpoint(tmp_path / "damaged", None).step == newest_whole
            assert "not taking" in caplog.text


def test_a_training_starts_from_a_memory(runs, pair, inputs_dir):
    """Its first loss is the memory's own, by a dense oracle; from OUTPUT, from its weights/, at any stage and
    world."""
    trained = read_weights(runs / "one-stage2")
    memory = Memory(MemoryConfig.from_dict(trained.memory))
    memory.load_state_dict(trained.weights)
    keys = open_keys(inputs_dir / "keys")
    reader = BatchReader(
        keys,
        open_targets(inputs_dir / "targets"),
        TrainingOrder(
            num_positions=keys.num_positions,
            block_size=keys.manifest.block_size,
            window_blocks=FLAGS["shuffle_window_blocks"],
            seed=0,
        ),
        batch_positions=BATCH,
        rank=0,
        size=1,
        num_micro_batches=1,
        with_log_probabilities=False,
    )
    (batch,), _ = next(iter(reader.stream(0, 1)))
    logs_NV = memory.head(memory(batch.inputs_NI.float())).double().log_softmax(-1)
    label_logs_N = logs_NV.gather(1, batch.targets.labels_N[:, None])[:, 0]
    ce = -label_logs_N.mean().item()
    first = runs.lines("one-from-memory")[0]
    assert abs(first["ce"] - ce) < 2e-6 * ce
    assert first["loss"] < 0.9 * runs.losses("one-stage2")[0]
    np.testing.assert_allclose(runs.losses("two-from-weights"), runs.losses("one-from-memory"), rtol=PARITY)
    sha256 = hash_initial_memory(open_initial_memory(runs / "one-stage2"), World())
    for name in ("one-from-memory", "two-from-weights"):
        identity = json.loads((runs / name / "identity.json").read_text())
        assert identity["inputs"]["init_from"] == read_weights(runs / name).provenance.init_from == sha256


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_blocks": 3}, "has num blocks 2, and --num-blocks asks for 3"),
        ({"init_from": "corpus"}, "holds no memory"),
        ({"init_from": "nowhere"}, "holds no memory"),
        ({"head": "base", "model": "x"}, "leave out --head base"),
    ],
)
def test_memories_that_do_not_fit_leave_the_disk_untouched(runs, single, inputs_dir, changes, said):
    values = {"init_from": runs / "one-stage2", **changes}
    if isinstance(values["init_from"], str):
        values["init_from"] = inputs_dir / values["init_from"]
    runs.refuse(said, "wrong", 2, **values)


def test_all_damaged_is_refused(runs, single):
    shutil.copytree(runs / "one-stage2", runs / "one-broken")
    runs.unfinish("one-broken")
    for path in (runs / "one-broken" / "checkpoints").glob("step-*"):
        (path / "manifest.json").write_text("{")
    before = {path.name for path in (runs / "one-broken").iterdir()}
    (code,), (said,) = runs.run(runs.start("one-broken", 2))
    assert code == [2] and "to start anew" in said, said
    assert before <= {path.name for path in (runs / "one-broken").iterdir()}
    assert not (runs / "one-broken" / "weights").exists()
