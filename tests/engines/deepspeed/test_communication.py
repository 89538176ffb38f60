"""What the configurations that we ship send between ranks in a step, counted on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
LIMIT = 47  # minutes that a collective may take
SIZE = 2 * 64 * 64 * 2  # bytes of the model's parameters, bfloat16

SCRIPT = """
import collections, datetime, functools, json, os, socket, sys
from pathlib import Path
import torch
from torch import nn

counted, is_inside = collections.Counter(), False

def watch(name):
    call = getattr(torch.distributed, name)
    @functools.wraps(call)
    def counting(*tensors, **named):
        global is_inside
        if is_inside:
            return call(*tensors, **named)
        given = [value for value in (*tensors, *named.values()) if isinstance(value, torch.Tensor)]
        counted[name] += max((tensor.nbytes for tensor in given), default=0)  # the whole
        is_inside = True
        try:
            return call(*tensors, **named)
        finally:
            is_inside = False
    setattr(torch.distributed, name, counting)

for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
    watch(name)  # before DeepSpeed takes hold of some of them
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.config import micro_batches_per_step, resolve_ds_config
from mlpmem_ds.engines.deepspeed.engine import AdamWSettings, build_engine
from mlpmem_ds.engines.deepspeed.library import import_deepspeed
from mlpmem_ds.engines.deepspeed.process_group import set_up_distributed
import_deepspeed()

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(64, 64, bias=False) for _ in range(2))
    def forward(self, rows):
        return (self.second(self.first(rows)).float().square().mean(),)

def limits():
    '''The seconds that each group gives a collective, in the order in which the groups were made.'''
    groups = torch.distributed.distributed_c10d._world.pg_map
    of_host = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    return [limit.total_seconds() for limit in of_host]

def run_rank(world, files):
    set_up_distributed(world, timeout=datetime.timedelta(minutes=int(sys.argv[1])))
    found = {}
    for file in map(Path, files):
        # With hpZ one engine a process: DeepSpeed makes the groups inside nodes once.
        for micro_batch in (2, 1) if file.stem in ("zero1", "zero2", "zero3", "zero2-owners") else (2,):
            config = resolve_ds_config(file, batch=4, batch_flag="--b", world_size=2, gradient_clipping=1.0,
                                       max_micro_batch=micro_batch)
            if config["zero_optimization"]["stage"] == 3:  # the small model is cut like a large one
                config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            engine = build_engine(Model, config=config, settings=AdamWSettings(), seed=3, world=world)
            count = micro_batches_per_step(config)
            for step in range(2):  # the first one sets up
                counted.clear()
                engine.train_step([(torch.randn(micro_batch, 64).bfloat16(),)] * count, 0.01)
            found[f"{file.stem} {count}"] = dict(counted)
    if world.is_first:
        print(json.dumps([found, limits()]), flush=True)

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
child = os.fork()
rank, code = int(child == 0), 1
try:
    run_rank(World(rank=rank, size=2, local_rank=rank), sys.argv[2:])
    code = 0
except BaseException:
    import traceback
    traceback.print_exc()
if rank == 0:
    code = code or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.stdout.flush()
os._exit(code)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What ranks sent with each file, and the limits of their groups."""
    root = tmp_path_factory.mktemp("communication")
    files = {name: REPOSITORY / "ds_configs" / f"{name}.json" for name in ("zero1", "zero2", "zero3")}
    for name in tuple(files):
        in_float32 = {**json.loads(files[name].read_text()), "communication_data_type": "fp32"}
        files[f"{name}-fp32"] = root / f"{name}-fp32.json"
        files[f"{name}-fp32"].write_text(json.dumps(in_float32))
    to_owners = json.loads(files["zero2"].read_text())
    to_owners["zero_optimization"]["use_multi_rank_bucket_allreduce"] = False
    files["zero2-owners"] = root / "zero2-owners.json"
    files["zero2-owners"].write_text(json.dumps(to_owners))
    within = json.loads((REPOSITORY / "ds_configs" / "zero3_hpz.json").read_text())
    within["zero_optimization"]["zero_hpz_partition_size"] = 2
    files["zero3_hpz"] = root / "zero3_hpz.json"
    files["zero3_hpz"].write_text(json.dumps(within))
    (root / "script.py").write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, root / "script.py", str(LIMIT), *files.values()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def sent(ran):
    """`"file micro-batches"` → collective -> bytes of the tensors given to it in a step."""
    return ran[0]


def test_stage_1_reduces_all_gradients_on_every_rank_once_a_step(sent):
    """DeepSpeed's optimizer for bf16 with float32 sums: nothing is scattered, however many micro-batches."""
    for count in (1, 2):
        assert sent[f"zero1 {count}"] == {"all_reduce": SIZE, "all_gather_into_tensor": SIZE}


def test_stage_2_reduces_on_every_rank_after_each_micro_batch(sent):
    for count in (1, 2):
        step = sent[f"zero2 {count}"]
        assert (
            count * SIZE <= step["all_reduce"] < count * SIZE + 100
        )  # and whether all are finite, and the norm
        assert step["all_gather_into_tensor"] == SIZE
        assert "reduce_scatter_tensor" not in step and "reduce" not in step
        to_owners = sent[f"zero2-owners {count}"]
        assert to_owners["reduce"] == count * SIZE and to_owners["all_reduce"] < 100


def test_stage_3_scatters_gradients_and_gathers_weights_in_each_micro_batch(sent):
    for name, count in (("zero3", 1), ("zero3", 2), ("zero3_hpz", 1)):
        step = sent[f"{name} {count}"]
        assert step["reduce_scatter_tensor"] == count * SIZE and step["all_reduce"] < 100
        assert step["all_gather_into_tensor"] >= count * SIZE


def test_gradients_may_travel_in_float32(sent):
    for name, call in (("zero1", "all_reduce"), ("zero2", "all_reduce"), ("zero3", "reduce_scatter_tensor")):
        step = sent[f"{name}-fp32 1"]
        assert 2 * SIZE <= step[call] < 2 * SIZE + 100, name


def test_the_groups_that_deepspeed_makes_have_the_limit_of_the_training(ran):
    """Left to torch, those of NCCL would have ten minutes. The waiting group has none to speak of."""
    everyone, waiting, *of_deepspeed = ran[1]
    assert everyone == 60 * LIMIT and waiting > 60 * 60 * 24
    assert len(of_deepspeed) >= 2, "a group of all ranks, and one within nodes"
    assert set(of_deepspeed) == {60 * LIMIT}
