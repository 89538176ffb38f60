"""Training, in real processes: launchers, worlds, ZeRO stages, resume, kill, damage.

A process with DeepSpeed costs 10 s to start: most ranks are forked from one that has it
(tests/stages/forked_training.py), and what mpirun starts runs a list of jobs. torchrun is in
test_train_base.py.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import record_file
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.batches import BatchReader, TrainingOrder
from mlpmem_ds.formats.checkpoint import read_weights
from mlpmem_ds.formats.corpus import CorpusManifest, CorpusUnit, SplitManifest, TokenizerFacts
from mlpmem_ds.formats.keys import bfloat16_bits, open_keys
from mlpmem_ds.formats.targets import index_name, open_targets, pack_block, shard_name, write_shard
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.models.memory import Memory, MemoryConfig
from mlpmem_ds.stages.conversion.weights import describe_checkpoint, find_checkpoint, with_weights
from mlpmem_ds.stages.training import train
from mlpmem_ds.stages.training.initial_memory import open_initial_memory

REPOSITORY = Path(__file__).resolve().parents[3]
N, VOCABULARY, WIDTH, BLOCK = 601, 61, 12, 64
HALF, STEPS, BATCH = 10, 20, 48
PARITY = 1e-5  # of float32 losses over all steps, relative
COMPILES_ADAM = os.environ.get("MLPMEM_TEST_COMPILED_ADAM") == "1"
BF16_PARITY = 2e-2  # of bfloat16 losses to float32's
FLAGS = {
    "epochs": 1.6,
    "batch_positions": BATCH,
    "hidden_size": 16,
    "num_blocks": 2,
    "save_every_steps": HALF,
    "keep_checkpoints": 9,
    "log_every_steps": 1,
    "shuffle_window_blocks": 4,
    "micro_batch_positions": 12,
    "learning_rate": 0.02,
}

DRIVER = """
import json, os, sys, threading, time
from pathlib import Path
from mlpmem_ds.core.log import set_up_logging
from mlpmem_ds.core.world import world_from_environment
from mlpmem_ds.stages.training import train
world = world_from_environment(os.environ)
set_up_logging(world, name="driver")
for job in json.loads(Path(sys.argv[1]).read_text()):
    signal_at = job.pop("signal_at", None)
    config = train.Config(**{k: Path(v) if k in ("ds_config", "corpus", "targets", "keys", "output",
        "init_from") else v
                             for k, v in job.items()})
    if signal_at is not None and world.rank == world.size - 1:
        def watch(path=config.output / "metrics.jsonl"):
            while not path.exists() or path.read_text().count("\\n") < signal_at:
                time.sleep(0.001)
            os.kill(os.getpid(), 15)
        threading.Thread(target=watch, daemon=True).start()
    train.run(config, world)
"""


@dataclass(frozen=True, kw_only=True)
class _Nothing:
    """A stage's flags, of which the fixtures need none."""


def publish_stage(root, stage, inputs, files, fields):
    """A complete stage directory of one unit that holds `files`: name → function of a path."""
    directory = open_stage(root, stage=stage, version=1, config=_Nothing(), inputs=inputs, world=World())

    def compute(unit, writer):
        for name, write in files.items():
            with writer.file(name) as path:
                write(path)

    directory.run_units(["all"], compute)
    assert directory.finish(["all"], lambda: fields)
    return record_file(root, "manifest.json").sha256


def make_inputs(root):
    """A corpus, keys and targets that belong together, of N positions; rows of every kind, a row without
    targets too."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCABULARY, N + 1)
    tokens_bytes = tokens.astype("<u2").tobytes()
    corpus = publish_stage(
        root / "corpus",
        "corpus",
        {},
        {"train/tokens-0.bin": lambda path: path.write_bytes(tokens_bytes)},
        CorpusManifest(
            tokenizer=TokenizerFacts(vocabulary_sha256="v" * 64, vocab_size=VOCABULARY, end_of_document_id=0),
            token_dtype="<u2",
            block_size=BLOCK,
            stride=BLOCK // 2,
            splits={
                "train": SplitManifest.of_units([CorpusUnit(unit="0", tokens=N + 1, documents=1, bytes=N)])
            },
        ),
    )
    # The input tells the label (and noise): there is something to learn.
    directions = generator.standard_normal((VOCABULARY, WIDTH))
    inputs = bfloat16_bits(directions[tokens[1:]] + 0.3 * generator.standard_normal((N, WIDTH)))
    logs = np.log(generator.uniform(0.01, 0.2, N)).astype(np.float32)
    arrays, unit_positions = (
        {"values": tokens[1:].astype("<u2"), "log_probabilities": logs, "inputs": inputs},
        256,
    )

    def writer_of(array):
        return lambda path: np.save(open(path, "wb"), array)  # noqa: SIM115

    keys = publish_stage(
        root / "keys",
        "keys",
        {"corpus": corpus, "model": "m" * 64},
        {
            f"{name}-{first:012d}.npy": writer_of(array[first : first + unit_positions])
            for name, array in arrays.items()
            for first in range(0, N, unit_positions)
        },
        {
            "codec": {"name": "int8", "dim": 4, "scale": 1.0},
            "num_positions": N,
            "unit_positions": unit_positions,
            "input_size": WIDTH,
            "key_layer": 1,
            "input_layer": 1,
            "key_point": "ffn_input",
            "vocab_size": VOCABULARY,
            "head_size": VOCABULARY,
            "split": "train",
            "block_size": BLOCK,
        },
    )
    blocks, entries = [], []
    for first in range(0, N, BLOCK):
        rows = [
            np.sort(generator.choice(VOCABULARY, generator.integers(0, 6), replace=False))
            for _ in range(min(BLOCK, N - first))
        ]
        weights = [generator.dirichlet(np.ones(len(row))) if len(row) else np.empty(0) for row in rows]
        sparse = SparseRows.of_counts(
            np.array([len(row) for row in rows]), np.concatenate(rows), np.concatenate(weights)
        )
        entries.append(len(sparse.ids))
        blocks.append(pack_block(first, sparse, dtype=np.dtype("<u2")))
    publish_targets(root, "targets", keys, blocks, entries, cuts=())
    publish_targets(root, "uneven", keys, blocks, entries, cuts=(1, 3))
    publish_targets(root, "gap", keys, blocks, entries, cuts=(1, 3), left_out=1)
    publish_targets(root, "short", keys, blocks, entries, cuts=(1, 3), left_out=2)
    return root


def publish_targets(root, name, keys, blocks, entries, *, cuts, left_out=None):
    """Targets whose shards end before these blocks; the manifest does not know of shard number `left_out`."""
    files, shards = {}, []
    for start, stop in itertools.pairwise((0, *cuts, len(blocks))):
        first, count = start * BLOCK, min(stop * BLOCK, N) - start * BLOCK
        shard = shard_name(first, count)
        write_shard(root / shard, root / index_name(shard), blocks[start:stop])
        for file in (shard, index_name(shard)):
            files[file] = lambda path, file=file: shutil.move(root / file, path)
        shards.append(
            {
                "name": shard,
                "first": first,
                "count": count,
                "samples": stop - start,
                "entries": sum(entries[start:stop]),
            }
        )
    shards = [shard for number, shard in enumerate(shards) if number != left_out]
    fields = {"num_positions": N, "block_size": BLOCK, "vocab_size": VOCABULARY, "shards": shards}
    publish_stage(root / name, "targets", {"keys": keys}, files, fields)


def ds_config(root, stage, *, bf16=False, own_adam=False, **zero):
    """A small DeepSpeed file; fp32 unless told, with torch's AdamW unless `own_adam`, which matters where it
    is offloaded."""
    path = root / f"stage{stage}{'_bf16' if bf16 else ''}{'_adam' if own_adam else ''}{'_'.join(zero)}.json"
    section = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}), **zero}
    path.write_text(
        json.dumps(
            {
                "bf16": {"enabled": bf16},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": own_adam,
                "gradient_clipping": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "zero_optimization": section,
            }
        )
    )
    return path


def job(root, name, config, **changes):
    return {
        **FLAGS,
        "ds_config": str(config),
        "corpus": str(root / "corpus"),
        "targets": str(root / "targets"),
        "output": str(root / name),
        **changes,
    }


def arguments(job):
    return [word for name, value in job.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def environment():
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMPI_", "PMIX", "SLURM", "MASTER"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}


def free_port():
    return str(random.SystemRandom().randrange(30000, 60000))


def launcher(kind, world):
    """The words before the script's."""
    tool = str(Path(sys.executable).parent / kind)
    if kind == "mpirun":
        return [tool, "--allow-run-as-root", "--oversubscribe", "-n", str(world), sys.executable]
    return [tool, "--num_accelerators", str(world), "--master_port", free_port()]


def start(words):
    return subprocess.Popen(
        words,
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        kill_group(process)
    return process.returncode, output


def kill_group(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def drive(root, kind, world, jobs):
    """Run jobs in one start of `world` processes; its output."""
    (root / "driver.py").write_text(DRIVER)
    (root / "jobs.json").write_text(json.dumps(jobs))
    code, output = finish(start([*launcher(kind, world), str(root / "driver.py"), str(root / "jobs.json")]))
    assert code == 0, output
    return output


def drive_forked(forked_training, jobs, size=1):
    """Run jobs in forked ranks; what they said."""
    steps = [
        {"kind": "start", "signal_at": job.pop("signal_at", None), "job": job, "size": size} for job in jobs
    ]
    results, said = forked_training(*steps)
    assert results == [[0] * size] * len(jobs), "".join(said)
    return "".join(said)


def losses(root, name):
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines])


def weights(root, name):
    return load_file(root / name / "weights" / "model.safetensors")


def assert_same_weights(root, one, other):
    first, second = weights(root, one), weights(root, other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def rewind(root, source, target, step):
    """A copy of a finished training, as if it had been killed after the checkpoint of `step`."""
    shutil.copytree(root / source, root / target)
    for path in (root / target / "checkpoints").glob("step-*"):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    unfinish(root / target)


def unfinish(output):
    (output / "manifest.json").unlink()
    shutil.rmtree(output / "weights")
    shutil.rmtree(output / "done")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def single(root, forked_training):
    """World of one, plain python: every stage from one seed, and a bf16 run."""
    jobs = [job(root, f"one-stage{stage}", ds_config(root, stage)) for stage in (0, 1, 2, 3)]
    jobs += [
        job(root, "one-stopped", ds_config(root, 2), signal_at=2),
        job(root, "one-stopped", ds_config(root, 2)),
        job(root, "one-uneven", ds_config(root, 2), targets=str(root / "uneven")),
        job(root, "one-ce", ds_config(root, 2), alpha=0.0),
        job(root, "one-shipped1", REPOSITORY / "ds_configs" / "zero1.json"),
        job(root, "one-mixture", ds_config(root, 2), ce_through="mixture"),
        job(root, "one-from-memory", ds_config(root, 3), init_from=str(root / "one-stage2")),
    ]
    return drive_forked(forked_training, jobs)


@pytest.fixture(scope="module")
def pair(root, single, forked_training):
    """Two ranks: every stage; bf16 ZeRO-3 straight, resumed, stopped; the single world's checkpoints taken
    over."""
    bf16 = ds_config(root, 3, bf16=True)
    rewind(root, "one-stage2", "one2-to-two3", 10)
    jobs = [job(root, f"two-stage{stage}", ds_config(root, stage)) for stage in (0, 1, 2, 3)]
    jobs += [
        job(root, "two-offload", ds_config(root, 3, offload_optimizer={"device": "cpu"})),
        job(root, "two-from-weights", ds_config(root, 2), init_from=str(root / "one-stage2" / "weights")),
        job(root, "one2-to-two3", ds_config(root, 3)),
        job(root, "two-bf16", bf16),
        job(root, "two-shipped1", REPOSITORY / "ds_configs" / "zero1.json"),
        job(root, "two-stopped", bf16, signal_at=2),
        job(root, "two-stopped", bf16),
    ]
    if COMPILES_ADAM:
        jobs.append(
            job(
                root,
                "two-offload-adam",
                ds_config(root, 3, own_adam=True, offload_optimizer={"device": "cpu"}),
            )
        )
    output = drive_forked(forked_training, jobs, size=2)
    rewind(root, "two-bf16", "two-rewound", 10)
    shutil.copytree(root / "two-bf16", root / "two-damaged")
    unfinish(root / "two-damaged")
    victim = max((root / "two-damaged" / "checkpoints" / "step-00000020").glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (root / "two-damaged" / "checkpoints" / "step-00000021.tmp").mkdir()
    for stage in (1, 2, 3):
        rewind(root, "two-stage3", f"two3-to-one{stage}", 10)
    rewind(root, "two-stage3", "two3-to-three2", 10)
    return output


def test_stages_and_worlds_give_the_losses_of_one_process(root, single, pair):
    plain = losses(root, "one-stage0")
    assert len(plain) == STEPS and plain[-1] < plain[0]
    names = [f"one-stage{stage}" for stage in (1, 2, 3)] + [f"two-stage{stage}" for stage in (1, 2, 3)]
    names += ["two-offload"] + ["two-offload-adam"] * COMPILES_ADAM
    for name in names:
        np.testing.assert_allclose(losses(root, name), plain, rtol=PARITY, err_msg=name)
    for name in (
        "two-bf16",
        "one-shipped1",
        "two-shipped1",
    ):  # the latter by DeepSpeed's optimizer for bf16 at stage 1
        np.testing.assert_allclose(losses(root, name), plain, rtol=BF16_PARITY, err_msg=name)


def test_shards_of_uneven_sizes_give_the_same_weights(root, single):
    assert_same_weights(root, "one-uneven", "one-stage2")


@pytest.mark.parametrize(
    "name, said",
    [("gap", "leave positions from 64 out"), ("short", "hold 192 of 601"), ("uneven", "is missing")],
)
def test_too_few_shards_are_refused_before_anything_is_written(root, tmp_path, name, said):
    shutil.copytree(root / name, tmp_path / "targets")
    if name == "uneven":
        (tmp_path / "targets" / shard_name(BLOCK, 2 * BLOCK)).unlink()
    values = job(root, "wrong", ds_config(root, 2), targets=tmp_path / "targets", keys=root / "keys")
    paths = ("ds_config", "corpus", "output")
    with pytest.raises(UserError, match=said):
        train.run(
            train.Config(**{name: Path(value) if name in paths else value for name, value in values.items()}),
            World(),
        )
    assert not (root / "wrong").exists()


def test_weights_load_into_a_plain_memory(root, pair):
    memory = Memory(
        MemoryConfig(
            input_size=WIDTH, hidden_size=16, intermediate_size=64, num_blocks=2, vocab_size=VOCABULARY
        )
    )
    trained = read_weights(root / "two-stage3")
    memory.load_state_dict(trained.weights)  # names and shapes
    assert trained.memory == memory.config.to_dict()
    assert trained.provenance["base"] == "m" * 64 and trained.provenance["steps"] == STEPS


def test_a_stopped_run_continues_to_the_same_weights(root, single, pair):
    assert "stopped as asked" in single and "stopped as asked" in pair
    assert_same_weights(root, "one-stopped", "one-stage2")
    assert_same_weights(root, "two-stopped", "two-bf16")
    np.testing.assert_array_equal(losses(root, "two-stopped"), losses(root, "two-bf16"))


def test_resume_at_another_world_and_stage(root, pair, forked_training):
    np.testing.assert_allclose(losses(root, "one2-to-two3"), losses(root, "one-stage0"), rtol=PARITY)
    drive_forked(
        forked_training, [job(root, f"two3-to-one{stage}", ds_config(root, stage)) for stage in (1, 2, 3)]
    )
    three = {"kind": "start", "size": 3, "job": job(root, "two3-to-three2", ds_config(root, 2))}
    results, said = forked_training(three)
    assert results == [[0, 0, 0]] and "of 2 ranks at ZeRO stage 3, this run has 3 at stage 2" in said[0], said
    for name in ("two3-to-one1", "two3-to-one2", "two3-to-one3", "two3-to-three2"):
        np.testing.assert_allclose(losses(root, name), losses(root, "one-stage0"), rtol=PARITY, err_msg=name)


def test_resume_and_damage_and_complete(root, pair):
    """20 steps = 10 + 10 bit for bit, through mpirun; a flipped byte costs the newest checkpoint and nothing
    else."""
    bf16 = ds_config(root, 3, bf16=True)
    output = drive(
        root,
        "mpirun",
        2,
        [job(root, "two-rewound", bf16), job(root, "two-damaged", bf16), job(root, "two-bf16", bf16)],
    )
    assert_same_weights(root, "two-rewound", "two-bf16")
    np.testing.assert_array_equal(losses(root, "two-rewound"), losses(root, "two-bf16"))
    assert "does not have the checksum" in output and "step-00000020" in output
    assert_same_weights(root, "two-damaged", "two-bf16")
    assert (root / "two-damaged" / "checkpoints" / "step-00000020.damaged").is_dir()
    assert not list((root / "two-damaged" / "checkpoints").glob("*.tmp"))
    assert output.count("complete: ") == 3


def test_sigterm_to_the_launcher_saves_and_leaves_no_orphan(root, pair, forked_training):
    """`deepspeed` alone is told to stop, and does not tell its ranks; they save, end, and the same command
    continues."""
    config = job(root, "terminated", ds_config(root, 3, bf16=True), save_every_steps=100, epochs=6.0)
    words = [*launcher("deepspeed", 2), "launch/train.py", *arguments(config)]
    process = start(words)
    metrics, deadline = root / "terminated" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)  # its ranks share the pipe: it ends when the last of them has
    deadline = time.monotonic() + 30
    while members_of_group(process.pid):
        assert time.monotonic() < deadline, members_of_group(process.pid)
        time.sleep(0.05)
    assert "stopped as asked and saved" in output and not (root / "terminated" / "manifest.json").exists(), (
        output
    )
    results, said = forked_training({"kind": "start", "size": 2, "job": config})
    assert results == [[0, 0]] and "resuming from" in said[0], said
    assert len(losses(root, "terminated")) == 6 * N // BATCH  # each step once


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
def test_checkpoints_of_every_layout_convert(root, pair, tmp_path, name):
    """The last step's checkpoint holds the weights that the training wrote; an earlier one holds others."""
    wanted = weights(root, name)
    for step, is_last in ((None, True), (HALF, False)):
        checkpoint = find_checkpoint(root / name, step)
        found = with_weights(describe_checkpoint(checkpoint), checkpoint, tmp_path / "out")
        assert found.provenance["steps"] == checkpoint.step == (STEPS if is_last else HALF)
        assert found.provenance["steps_planned"] == STEPS and found.weights.keys() == wanted.keys()
        assert is_last == all(torch.equal(tensor, wanted[key]) for key, tensor in found.weights.items())
        if is_last:
            memory = Memory(MemoryConfig.from_dict(found.memory))
            memory.load_state_dict(found.weights)
            trained = Memory(MemoryConfig.from_dict(found.memory))
            trained.load_state_dict(wanted)
            inputs = torch.randn(9, WIDTH)
            assert (memory.head(memory(inputs)) - trained.head(trained(inputs))).abs().max() <= 1e-6
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_cannot_be_taken(root, pair, tmp_path, caplog):
    """A damaged one is passed over, with a warning; what is not there is refused with what is."""
    with pytest.raises(UserError, match=f"has checkpoints of steps {HALF}, {STEPS}"):
        find_checkpoint(root / "one-stage2", 5)
    with pytest.raises(UserError, match="is one checkpoint: give the training's output"):
        find_checkpoint(root / "one-stage2" / "checkpoints" / "step-00000020", None)
    with pytest.raises(UserError, match="is no output directory of launch/train.py"):
        find_checkpoint(root / "corpus", None)
    shutil.copytree(root / "one-stage2", tmp_path / "damaged")
    for step, found in ((STEPS, HALF), (HALF, None)):
        (
            tmp_path / "damaged" / "checkpoints" / f"step-{step:08d}" / "mp_rank_00_model_states.pt"
        ).write_bytes(b"")
        if found is None:
            with pytest.raises(DamagedDataError, match="2 checkpoints are damaged"):
                find_checkpoint(tmp_path / "damaged", None)
        else:
            assert find_checkpoint(tmp_path / "damaged", None).step == found
            assert "not taking" in caplog.text


def test_a_training_starts_from_a_memory(root, pair):
    """Its first loss is the memory's own, by a dense oracle; from OUTPUT, from its weights/, at any stage and
    world."""
    trained = read_weights(root / "one-stage2")
    memory = Memory(MemoryConfig.from_dict(trained.memory))
    memory.load_state_dict(trained.weights)
    order = TrainingOrder(num_positions=N, block_size=BLOCK, window_blocks=4, seed=0)
    reader = BatchReader(
        open_keys(root / "keys"),
        open_targets(root / "targets"),
        order,
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
    lines = [
        json.loads(line) for line in (root / "one-from-memory" / "metrics.jsonl").read_text().splitlines()
    ]
    assert abs(lines[0]["ce"] - ce) < 2e-6 * ce
    assert lines[0]["loss"] < 0.9 * losses(root, "one-stage2")[0]
    np.testing.assert_allclose(losses(root, "two-from-weights"), losses(root, "one-from-memory"), rtol=PARITY)
    sha256 = open_initial_memory(root / "one-stage2").sha256
    for name in ("one-from-memory", "two-from-weights"):
        identity = json.loads((root / name / "identity.json").read_text())
        assert identity["inputs"]["init_from"] == read_weights(root / name).provenance["init_from"] == sha256


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_blocks": 3}, "has num blocks 2, and --num-blocks asks for 3"),
        ({"init_from": "corpus"}, "holds no memory"),
        ({"init_from": "nowhere"}, "holds no memory"),
        ({"head": "base", "model": "x"}, "leave out --head base"),
    ],
)
def test_memories_that_do_not_fit_leave_the_disk_untouched(root, single, changes, said):
    values = {**job(root, "wrong", ds_config(root, 2)), "init_from": "one-stage2", **changes}
    values["init_from"] = root / values["init_from"]
    paths = ("ds_config", "corpus", "targets", "output")
    with pytest.raises(UserError, match=said):
        train.run(
            train.Config(**{name: Path(value) if name in paths else value for name, value in values.items()}),
            World(),
        )
    assert not (root / "wrong").exists()


def members_of_group(group):
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(words[2]) == group and words[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_all_damaged_is_refused(root, single, forked_training):
    shutil.copytree(root / "one-stage2", root / "one-broken")
    unfinish(root / "one-broken")
    for path in (root / "one-broken" / "checkpoints").glob("step-*"):
        (path / "manifest.json").write_text("{")
    before = sorted(path.name for path in (root / "one-broken").iterdir())
    step = {"kind": "start", "job": job(root, "one-broken", ds_config(root, 2))}
    (code,), (output,) = forked_training(step)
    assert code == [2] and "to start anew" in output, output
    assert set(before) <= {path.name for path in (root / "one-broken").iterdir()}
    assert not (root / "one-broken" / "weights").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_positions": 1000}, "do not fill one batch"),
        ({"batch_positions": 47}, "cannot be dealt evenly to 2 ranks"),
        ({"model": "/nowhere/at/all", "head": "base"}, "--model"),
        ({"keys": "corpus"}, "--keys"),
    ],
)
def test_wrong_inputs_leave_the_disk_untouched(root, changes, said):
    values = {**job(root, "wrong", ds_config(root, 2)), **changes}
    if "keys" in changes:
        values["keys"] = root / changes["keys"]
    paths = ("ds_config", "corpus", "targets", "keys", "output")
    with pytest.raises(UserError, match=said):
        config = train.Config(
            **{name: Path(value) if name in paths else value for name, value in values.items()}
        )
        train.run(config, World(rank=0, size=2))
    assert not (root / "wrong").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        ({"elasticity": {}}, "--batch-positions fixes the batch"),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}},
            'stage3_prefetch_bucket_size is "auto"',
        ),
    ],
)
def test_wrong_ds_configs_leave_the_disk_untouched(root, tmp_path, content, said):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    values = job(root, "wrong", path)
    values = {
        name: Path(value) if name in ("ds_config", "corpus", "targets", "output") else value
        for name, value in values.items()
    }
    with pytest.raises(UserError, match=said):
        train.run(train.Config(**values), World())
    assert not (root / "wrong").exists()


def test_the_default_learning_rate_binds_as_a_number(root, tmp_path, monkeypatch):
    class BegunError(Exception):
        pass

    def begin(world):
        raise BegunError

    def start(rate):
        paths = ("ds_config", "corpus", "targets", "output")
        values = {**job(root, "rate", ds_config(root, 2)), "learning_rate": rate, "output": tmp_path / "rate"}
        train.run(
            train.Config(**{name: Path(v) if name in paths else v for name, v in values.items()}), World()
        )

    monkeypatch.setattr(train, "set_up_distributed", begin)
    for rate in (None, 2e-3):
        with pytest.raises(BegunError):
            start(rate)
        for file in ("identity.json", "run.json"):
            assert json.loads((tmp_path / "rate" / file).read_text())["config"]["learning_rate"] == 2e-3
    with pytest.raises(UserError, match="learning_rate was 0.002, now 0.001"):
        start(1e-3)
