"""Checkpoints taken over by other numbers of ranks, stages and layouts, with a rank that is slow to read."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.engines.deepspeed.saved_shards import PARTS, SavedShards
from mlpmem_ds.engines.deepspeed.weights import weights_of_checkpoint
from mlpmem_ds.formats.checkpoint import read_checkpoint

REPOSITORY = Path(__file__).resolve().parents[3]
STAGES = ("zero1", "zero2", "zero3", "zero3_hpz")
LIMIT, SLEEP = 6.0, 8.0  # seconds: of a collective, of the slow rank

SCRIPT = """
import datetime, json, os, socket, sys, time, traceback
from pathlib import Path
import torch
from mlpmem_ds.core.world import World
from mlpmem_ds.engines import checkpoints
from mlpmem_ds.engines.deepspeed import engine as engine_file, zero_state
from mlpmem_ds.engines.deepspeed.config import resolve_ds_config
from mlpmem_ds.engines.deepspeed.engine import AdamWSettings, build_engine
from mlpmem_ds.engines.deepspeed.library import import_deepspeed, import_part
from mlpmem_ds.engines.deepspeed.process_group import set_up_distributed
from mlpmem_ds.engines.deepspeed.saved_shards import PARTS, SavedShards
from mlpmem_ds.engines.deepspeed.zero_state import link_moments, load_other_layout, set_parameter
from mlpmem_ds.engines.processes import sum_over_ranks
from mlpmem_ds.maths.sparse_loss import TargetBatch
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.objective import MemoryWithLoss
import_deepspeed()
root, limit, sleep = Path(sys.argv[1]), *map(float, sys.argv[2:4])
files = json.loads(sys.argv[4])
memory = MemoryConfig(input_size=10, hidden_size=11, intermediate_size=13, num_blocks=2, vocab_size=17)

def build(name, world, zero=None, **more):
    config = resolve_ds_config(Path(files[name]), batch=6, batch_flag="--b", world_size=world.size,
                               max_micro_batch=6, gradient_clipping=1.0)
    config["zero_optimization"] |= zero or {}
    if config["zero_optimization"]["stage"] == 3:  # some matrices are cut, the rest stays whole on each rank
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 120
    return build_engine(lambda: MemoryWithLoss(memory, alpha=0.5), config=config,
                        settings=AdamWSettings(), seed=3, world=world, **more)

def everything(engine):
    '''name -> [float32 weight, its moments, what the forward reads], whole, on every rank.'''
    found, parts = {}, import_part("utils")
    if engine.stage < 3:
        link_moments(engine._engine.optimizer)
    zero = import_deepspeed().zero
    for name, parameter in engine.module.named_parameters():
        whole = [parts.safe_get_full_fp32_param(parameter)]
        whole += [parts.safe_get_full_optimizer_state(parameter, part) for part in PARTS[1:]]
        with zero.GatheredParameters([parameter]):
            found[name] = [part.reshape(parameter.shape).clone() for part in (*whole, parameter.detach())]
    return found

def slowly(call):
    is_first = True
    def slow(*arguments, **named):
        nonlocal is_first
        if is_first:
            time.sleep(sleep)
        is_first = False
        return call(*arguments, **named)
    return slow

def slow_on(rank, world, owner, name):
    if world.rank == rank:
        setattr(owner, name, slowly(getattr(owner, name)))

def arguments(count):
    inputs = torch.randn(count, 10).bfloat16()
    return inputs, TargetBatch(
        offsets_N1=torch.arange(0, 2 * count + 1, 2), ids=torch.tensor([1, 5] * count),
        probabilities=torch.tensor([0.5, 0.4] * count), labels_N=torch.arange(count),
    )

def save_all(world):
    set_up_distributed(world)
    for name in files:
        engine = build(name, world)
        for number in range(3):
            torch.manual_seed(10 * number + world.rank)
            engine.train_step([arguments(2)], 0.01)
        engine.save(root / name / "checkpoints", 3, subject={}, values={"x": 1}, keep=9)
        found = everything(engine)
        if world.is_first:
            torch.save(found, root / f"{name}.pt")

def start_meeting(world):
    set_up_distributed(world, timeout=datetime.timedelta(seconds=limit))

def resume_from(source, engine):
    saved = engine.resume(root / source / "checkpoints")
    assert saved.step == 3 and saved.values == {"x": 1}
    expected = torch.load(root / f"{source}.pt", weights_only=True)
    for key, parts in everything(engine).items():
        for number, (part, expected_part) in enumerate(zip(parts, expected[key])):
            assert torch.equal(part, expected_part), (source, engine.stage, key, number)

def take_over(world):
    '''Every checkpoint into every stage; a rank's listing lacks what another wrote a minute ago.'''
    set_up_distributed(world)
    listed, late = Path.glob, f"zero_pp_rank_{2 * world.rank}_mp_rank_00_optim_states.pt"
    Path.glob = lambda *given: (path for path in listed(*given) if not path.name.endswith(late))
    for name in files:
        engine = build(name, world)
        for source in files:
            resume_from(source, engine)
        engine.train_step([arguments(3)], 0.01)

def go_on(world):
    '''As many ranks at the same stage, with the same flat groups and with others.'''
    set_up_distributed(world)
    by_names = []
    def load_by_names(*arguments, **named):
        by_names.append(arguments)
        load_other_layout(*arguments, **named)
    engine_file.load_other_layout = load_by_names
    other = {"zero2": [{"parameter_alignment": True}], "zero3": [{"sub_group_size": 100}]}
    for name in files:
        for zero in ({}, *other.get(name, ())):
            engine = build(name, world, zero)
            resume_from(name, engine)
            assert len(by_names) == bool(zero), (name, zero)
            by_names.clear()
            engine.train_step([arguments(2)], 0.01)
    engine = build("zero3", world)
    engine._engine.basic_optimizer.param_groups[0]["bias_correction"] = True  # as DeepSpeed's own Adam has
    resume_from("zero3", engine)
    assert by_names
    mix_up(world)

def mix_up(world):
    '''What DeepSpeed calls the float32 values of a weight are not those that it trains.'''
    engine = build("zero2", world, {"round_robin_gradients": True})
    engine.train_step([arguments(2)], 0.01)
    found = everything(engine).values()
    assert any(not torch.equal(weight.bfloat16(), read) for weight, *_, read in found)
    engine.save(root / "mixed" / "checkpoints", 1, subject={}, values={}, keep=9)

def head_slowly(world):
    start_meeting(world)
    read = slowly(lambda: torch.ones(17, 11))
    start_head = lambda model: set_parameter(model.head.weight, read, world)  # rank 0 reads it
    for name in files:
        engine = build(name, world, prepare=start_head)
        head = import_part("utils").safe_get_full_fp32_param(engine.module.head.weight)
        assert (head == 1).all() and head.numel() == 17 * 11

def check_slowly(world):
    resume_slowly(world, checkpoints, "fault_of_checkpoint")

def read_slowly(world):
    resume_slowly(world, SavedShards, "read")

def resume_slowly(world, owner, name):
    start_meeting(world)
    engine = build("zero1", world)
    slow_on(1, world, owner, name)
    assert engine.resume(root / "zero1" / "checkpoints").step == 3

def write_slowly(world):
    engine = trained(world)
    engine_file.MAX_WEIGHTS_BYTES = 1000
    slow_on(1, world, zero_state, "publish")
    written = engine.write_weights(root / "weights").read()
    assert len(list((root / "weights").glob("*.safetensors"))) > 4
    for key, (weight, *_) in everything(engine).items():
        assert torch.equal(weight, written[key]), key

def save_slowly(world):
    save_with(world, 1, torch, "save")

def publish_slowly(world):
    save_with(world, 0, checkpoints, "publish_checkpoint")

def save_with(world, rank, owner, name):
    engine = trained(world)
    slow_on(rank, world, owner, name)
    engine.save(root / name / "checkpoints", 4, subject={}, values={}, keep=9)

def trained(world):
    start_meeting(world)
    engine = build("zero3_hpz", world)
    engine.train_step([arguments(3)], 0.01)
    return engine

def sum_slowly(world):
    '''The limit holds for a step: a rank that is as slow there ends the others.'''
    start_meeting(world)
    if world.rank == 1:
        time.sleep(sleep)
        return
    try:
        sum_over_ranks(torch.ones(1), world)
    except RuntimeError as error:
        (root / "limited").write_text(str(error))

def start(task, size):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                task(World(rank=rank, size=size, local_rank=rank))
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    return pids

def join(pids):
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert not any(codes), codes

join(start(save_all, 3))
# Next to a world that works, others that mostly sleep: half of them at once, within their time limit.
for working, size, sleeping in (
    (take_over, 2, (head_slowly, check_slowly, read_slowly, sum_slowly)),
    (go_on, 3, (write_slowly, save_slowly, publish_slowly)),
):
    pids = start(working, size)
    join(pids + [pid for task in sleeping for pid in start(task, 2)])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, forked_commands):
    """Checkpoints of three ranks at each stage, taken over by two ranks at each stage."""
    root = tmp_path_factory.mktemp("taken-over")
    files = {name: str(REPOSITORY / "ds_configs" / f"{name}.json") for name in STAGES}
    (root / "script.py").write_text(SCRIPT)
    result = subprocess.run(
        [forked_commands / "python", root / "script.py", root, str(LIMIT), str(SLEEP), json.dumps(files)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return root


def test_any_stage_and_number_of_ranks_goes_on_with_the_same_numbers(saved):
    """Weights, moments and what the forward reads, bit for bit; a slow rank is waited for."""
    assert "Timed out" in (saved / "limited").read_text()


def test_weights_that_deepspeed_mixes_up_are_not_read(saved):
    """Where this fails, `round_robin_gradients` need not be refused any more (deepspeed/config.py)."""
    with pytest.raises(DamagedDataError, match="saved with round_robin_gradients"):
        SavedShards(read_checkpoint(saved / "mixed" / "checkpoints" / "step-00000001"))


@pytest.mark.parametrize("name", STAGES)
def test_shards_are_read_by_slices(saved, name):
    checkpoint = read_checkpoint(saved / name / "checkpoints" / "step-00000003")
    shards = SavedShards(checkpoint)
    expected = torch.load(saved / f"{name}.pt", weights_only=True)
    assert set(shards.shapes) == set(expected)
    for key, parts in expected.items():
        for part, wanted in zip(PARTS, parts, strict=False):
            whole = shards.read(key, part)
            assert torch.equal(whole, wanted.reshape(-1))
            cut = len(whole) // 3
            assert torch.equal(shards.read(key, part, cut, 2 * cut), whole[cut : 2 * cut])
    weights = weights_of_checkpoint(checkpoint)
    for key, weight in weights.items():
        assert torch.equal(weight.read(), expected[key][0])


def test_a_missing_file_is_named(saved, tmp_path):
    path = tmp_path / "step-00000003"
    shutil.copytree(saved / "zero3" / "checkpoints" / path.name, path)
    max(path.glob("*_optim_states.pt")).unlink()
    shards = SavedShards(read_checkpoint(path))
    with pytest.raises(DamagedDataError, match="step-00000003 cannot be put together"):
        for key in shards.shapes:
            shards.read(key, "fp32")
