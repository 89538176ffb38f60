"""Which device a rank works on, with pretended GPUs."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed import library, process_group
from mlpmem_ds.engines.devices import device_of_rank, gpu_number, identity_of, ranks_of_a_gpu


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_ranks_of_a_node_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch, requested: str) -> None:
    pretend_gpus(monkeypatch, 8)
    worlds = [World(rank=8 + local, size=32, local_rank=local) for local in range(8)]
    devices = [device_of_rank(requested, world) for world in worlds]
    assert devices == [torch.device("cuda", number) for number in range(8)]


def test_a_rank_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 1)
    world = World(rank=3, size=8, local_rank=3)
    assert device_of_rank("auto", world) == torch.device("cuda:0")
    assert gpu_number(world) == 0


@pytest.mark.parametrize(
    ("local_size", "visible", "expected"),
    [(8, 8, 1), (16, 8, 2), (9, 8, 2), (4, 8, 1), (8, 1, 1), (None, 8, 1), (8, 0, 1)],
)
def test_more_ranks_than_gpus_share_them(
    monkeypatch: pytest.MonkeyPatch, local_size: int | None, visible: int, expected: int
) -> None:
    pretend_gpus(monkeypatch, visible)
    assert ranks_of_a_gpu(World(size=64, local_size=local_size)) == expected


def test_a_device_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 8)
    world = World(rank=3, size=8, local_rank=3)
    assert device_of_rank("cuda:1", world) == torch.device("cuda:1")
    assert device_of_rank("cpu", world) == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:8 is not here .*8 GPUs"):
        device_of_rank("cuda:8", world)


def test_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    assert device_of_rank("auto", World()) == torch.device("cpu")
    with pytest.raises(UserError, match="--device banana is not here"):
        device_of_rank("banana", World())
    with pytest.raises(UserError, match="--device meta is not here .nothing is computed there.: give auto"):
        device_of_rank("meta", World())
    with pytest.raises(UserError, match="--device cpu:1 is not here .there is one CPU.: give auto"):
        device_of_rank("cpu:1", World())
    with pytest.raises(UserError, match="--device xla is not here") as caught:
        device_of_rank("xla", World())
    assert len(str(caught.value)) < 200
    if not torch.backends.cuda.is_built():
        with pytest.raises(UserError, match="--device cuda is not here .*: give auto"):
            device_of_rank("cuda", World())


def test_deepspeed_is_told_the_number_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls set_device(LOCAL_RANK), also where each task of a node sees one GPU."""
    pretend_gpus(monkeypatch, 1)
    monkeypatch.setattr(process_group, "has_group", lambda: True)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    process_group.set_up_distributed(World(rank=11, size=16, local_rank=3))
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "0",
    }


def test_a_gpu_has_one_identity_by_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}")
    )
    assert identity_of(torch.device("cuda", 3)) == "GPU-3" and identity_of(torch.device("cpu")) == ""


def gpus_refused(gpus: list[str]) -> set[str]:
    """What ranks with these GPUs say, that share a store."""
    store, ranks = torch.distributed.HashStore(), range(len(gpus))

    def work(rank: int) -> str:
        try:
            world = World(rank=rank, size=len(gpus), local_rank=rank)
            process_group.refuse_unequal_gpus(store, world, gpus[rank])
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(gpus)) as threads:
        return set(threads.map(work, ranks))


def pretend_launch(
    monkeypatch: pytest.MonkeyPatch, gpus: list[str | None], join: Callable[..., None]
) -> torch.distributed.HashStore:
    """The store of a launch, in which ranks have told their GPUs; None: this rank's, which has not yet."""
    store = torch.distributed.HashStore()
    for rank, gpu in enumerate(gpus):
        if gpu is not None:
            store.set(f"gpu/{rank}", f"{socket.gethostname()}, {gpu}")
            store.set(f"has seen the GPUs/{rank}", "")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    library = SimpleNamespace(init_distributed=join)
    monkeypatch.setattr(process_group, "import_deepspeed", lambda: library)
    monkeypatch.setattr(process_group, "has_group", lambda: False)
    monkeypatch.setattr(process_group, "meeting_point", lambda *_: ("127.0.0.1", 1))
    monkeypatch.setattr(process_group, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(process_group, "join_store", lambda *_: store)
    return store


def test_a_training_with_two_ranks_on_a_gpu_is_refused_by_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL would refuse them too, as if a rank had been lost; and be started again for ever."""
    assert gpus_refused([f"GPU-{number}" for number in range(8)]) == {""}
    (said,) = gpus_refused(["GPU-a", "GPU-b", "GPU-c", "GPU-b"])
    assert said.startswith("ranks 1, 3 of 4 have one GPU (") and "GPU-b), " in said and "start 3 (" in said
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")  # NCCL's own, for parts of a GPU (MIG)
    assert gpus_refused(["GPU-a", "GPU-a"]) == {""}


def test_a_training_of_which_some_ranks_see_no_gpu_is_refused_by_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those with one would join NCCL's group, those without one gloo's, and wait for each other."""
    assert gpus_refused(["", ""]) == {""}
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    (said,) = gpus_refused(["GPU-1", ""])
    assert said.startswith("ranks 1 of 2 (on node7) see no GPU, and the others do: ") and "CUDA_VIS" in said
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    (said,) = gpus_refused(["", "GPU-1", "", "GPU-1"])
    assert said.startswith("ranks 0, 2 of 4 (on node7) see no GPU")


def test_a_rank_without_a_gpu_tells_the_others_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it joins a group: the others would never be in it."""
    pretend_gpus(monkeypatch, 0)
    store = pretend_launch(monkeypatch, ["GPU-1", None], lambda **_: pytest.fail("it joins a group"))
    with pytest.raises(UserError, match="ranks 1 of 2 .* see no GPU"):
        process_group.set_up_distributed(World(rank=1, size=2, local_rank=1))
    assert store.get("gpu/1").decode().endswith(", ")


def test_it_is_refused_before_nccl_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks on one GPU, each of which sees it as number 0."""
    pretend_gpus(monkeypatch, 1)
    done: list[str] = []
    others: list[str | None] = ["GPU-1"] * 8
    others[1] = None
    pretend_launch(monkeypatch, others, lambda **_: done.append("NCCL"))
    monkeypatch.setattr(process_group, "identity_of", lambda device: "GPU-1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: done.append(f"GPU {number}"))
    with pytest.raises(UserError, match="ranks 0, 1, 2, 3, 4, 5, 6, 7 of 8 have one GPU"):
        process_group.set_up_distributed(World(rank=1, size=8, local_rank=1))
    assert done == ["GPU 0"]


@pytest.mark.parametrize("gpus", [0, 8])
def test_deepspeeds_probe_of_its_operators_runs_on_cpus_alone(
    monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    """It starts compilers and asks every GPU, before this rank has chosen its own."""
    pretend_gpus(monkeypatch, gpus)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    probed: list[str] = []

    class Operators:
        @property
        def __compatible_ops__(self) -> dict[str, bool]:
            probed.append("probe")
            return {}

    monkeypatch.setattr(library, "import_part", lambda name: Operators())
    monkeypatch.setattr(importlib, "import_module", lambda name: object())
    library.import_deepspeed()
    assert probed == ([] if gpus else ["probe"])


@pytest.mark.parametrize(
    ("gpus", "given", "expected"), [(0, "cuda", "cpu"), (8, "cpu", None), (8, "cuda", "cuda")]
)
def test_deepspeed_computes_where_the_ranks_do(
    monkeypatch: pytest.MonkeyPatch, gpus: int, given: str, expected: str | None
) -> None:
    """A job takes DS_ACCELERATOR=cpu along from a login node, which has no GPU."""
    pretend_gpus(monkeypatch, gpus)
    monkeypatch.setenv("DS_ACCELERATOR", given)
    monkeypatch.setattr(library, "import_part", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: object())
    library.import_deepspeed()
    assert os.environ.get("DS_ACCELERATOR") == expected


def test_float32_products_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may have turned TF32 on."""
    pretend_gpus(monkeypatch, 8)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        device_of_rank("auto", World())
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
