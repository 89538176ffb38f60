"""Ranks as processes: where they meet, values exchanged, requests to stop, and the end.

The one file that uses torch.distributed. `engines.deepspeed.process_group` starts the group of a training,
`start_gloo_group` that of another stage (engines/collectives/torch_group.py).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import os
import re
import signal
import socket
import subprocess
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.core.world import World

_SECONDS_FOR_THREADS = 0.1
_STEPS_BACK = 2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_PATIENCE = datetime.timedelta(days=30)
_waiting_group: Any = None  # of this process; see `start_waiting_group`


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: a training step frees and asks again for the same ones."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def has_group() -> bool:
    """Whether this process is in a group."""
    return torch.distributed.is_initialized()


def start_waiting_group(world: World, timeout: datetime.timedelta) -> None:
    """Make the group in which ranks exchange values and wait while one of them reads or writes files.

    A collective of the training's own group fails after minutes, also where a rank is busy; here only the
    death of a rank ends the waiting. It goes over the network of the hosts (gloo) also where there are GPUs.
    Collective, once a process; `gather_values` and `wait_for_all` use it from then on.

    Args:
        world: this rank.
        timeout: of the connecting alone.

    Raises:
        UserError: the hosts do not reach each other.
    """
    global _waiting_group
    if world.size == 1 or _waiting_group is not None:
        return
    try:
        group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        torch.distributed.barrier(group=group)
        # PyTorch has no public name for it; a group that starts with no limit would also connect without one.
        torch.distributed.distributed_c10d._set_pg_timeout(_PATIENCE, group)
        _waiting_group = group
    except RuntimeError as error:
        raise UserError(
            f"rank {world.rank} of {world.size} did not reach the others over the hosts' network"
            f" ({first_line(error)}): set GLOO_SOCKET_IFNAME to the name of the network that joins"
            " them, as NCCL_SOCKET_IFNAME"
        ) from error


def group_maker(timeout: datetime.timedelta) -> Callable[..., Any]:
    """Makes groups of ranks as torch's `new_group` does, whose collectives end after this time."""
    return partial(torch.distributed.new_group, timeout=timeout)


def leave_process_group() -> None:
    """Before the interpreter ends: leave the group, and let gloo's threads drop the last tensors.

    They take Python's lock to do so, and one that asks for it while the interpreter is being taken down
    aborts the process ("terminate called without an active exception", one start in four with torch 2.13).
    """
    global _waiting_group
    if has_group():
        time.sleep(_SECONDS_FOR_THREADS)
        torch.distributed.destroy_process_group()
        _waiting_group = None
    time.sleep(_SECONDS_FOR_THREADS)


def meeting_point(world: World, environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of rank 0, which every rank works out alike.

    Raises:
        UserError: several ranks on several hosts have no MASTER_ADDR, or MASTER_PORT is not a number.
    """
    if world.size == 1 and not _port_of(environment):
        # Kubernetes sets MASTER_PORT to tcp://… in every pod next to a service that is called `master`.
        environment = {name: value for name, value in environment.items() if not name.startswith("MASTER_")}
    elif environment.get("MASTER_PORT") and not _port_of(environment):
        raise UserError(
            f"MASTER_PORT={environment['MASTER_PORT']} is not the number of a port: set it to a free one,"
            " such as 29500 (Kubernetes sets it itself next to a service that is called `master`)"
        )
    if environment.get("MASTER_ADDR") and environment.get("MASTER_PORT"):
        return environment["MASTER_ADDR"], _port_of(environment)
    if world.size == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", probe.getsockname()[1]
    job = next(
        (
            environment[name]
            for name in ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
            if name in environment
        ),
        "",
    )
    port = _port_of(environment) or 20000 + zlib.crc32(job.encode()) % 20000
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"], port
    num_nodes, nodes = _nodes_of_slurm(world, environment)
    if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(world.size) or num_nodes == "1":
        return "127.0.0.1", port
    if nodes is not None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
            names = subprocess.run(
                ["scontrol", "show", "hostnames", nodes],
                capture_output=True,
                encoding="utf-8",
                check=True,
            ).stdout.split()
            return names[0], port
    raise UserError(
        f"{world.size} ranks on several hosts do not know where to meet: set MASTER_ADDR to the name of "
        "rank 0's host (and MASTER_PORT to a free port), or start with torchrun or deepspeed"
    )


def _nodes_of_slurm(world: World, environment: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Number and list of the nodes that the ranks are on, as Slurm writes them: those of the step where each
    rank is a task of it. mpirun has ranks outside of its daemons' step: then those of the job."""
    task = (environment.get("SLURM_PROCID"), environment.get("SLURM_STEP_NUM_TASKS"))
    of = "STEP" if task == (str(world.rank), str(world.size)) else "JOB"
    return environment.get(f"SLURM_{of}_NUM_NODES"), environment.get(f"SLURM_{of}_NODELIST")


def _port_of(environment: Mapping[str, str]) -> int:
    """The number in MASTER_PORT; 0 where there is none."""
    text = environment.get("MASTER_PORT", "").strip()
    return int(text) if re.fullmatch("[0-9]{1,5}", text) and int(text) < 1 << 16 else 0


def join_store(world: World, environment: Mapping[str, str], timeout: datetime.timedelta) -> Any:
    """The key-value store that all ranks share and whose calls any thread may make; rank 0 or the launcher
    keeps it.

    Raises:
        UserError: the ranks do not know where to meet, or rank 0 was not there in time.
    """
    address, port = meeting_point(world, environment)
    # The store of torchrun's agent is found through the variables, and kept by the agent.
    place = (
        "env://" if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else f"tcp://{address}:{port}"
    )
    try:
        store, _, _ = next(
            torch.distributed.rendezvous(place, rank=world.rank, world_size=world.size, timeout=timeout)
        )
    except RuntimeError as error:
        raise UserError(
            f"rank {world.rank} of {world.size} did not meet the others at {address}:{port}"
            f" ({first_line(error)}): check that all ranks were started and that MASTER_ADDR and"
            " MASTER_PORT are those of rank 0's host"
        ) from error
    return torch.distributed.PrefixStore("mlpmem_ds", store)


def store_among(rank: int, gather: Callable[[Any], list[Any]]) -> Any | None:
    """A key-value store for ranks that are connected in another way; rank 0 keeps it. None, on every rank,
    where one of them does not reach it.

    Args:
        rank: this one.
        gather: every rank's value, in rank order.
    """
    store: Any = None
    new_store = partial(
        torch.distributed.TCPStore, wait_for_workers=False, timeout=datetime.timedelta(seconds=10)
    )
    if rank == 0:
        with contextlib.suppress(RuntimeError):
            store = new_store("127.0.0.1", 0, is_master=True)
    host, port = gather((socket.gethostname(), 0 if store is None else store.port))[0]
    if rank > 0 and port:
        with contextlib.suppress(RuntimeError):
            store = new_store(host, port, is_master=False)
    return store if all(gather(store is not None)) else None


def start_gloo_group(store: Any, world: World, timeout: datetime.timedelta) -> None:
    """Connect the ranks of a stage that computes on the host; each transfer may take `timeout`."""
    assert not has_group()
    torch.distributed.init_process_group(
        "gloo", store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )
    atexit.register(leave_process_group)


def swap_with_ranks(outgoing: torch.Tensor, to: int, incoming: torch.Tensor, source: int) -> None:
    """Send one tensor and receive another, either of which may be empty; returns when both have arrived."""
    requests: list[Any] = []
    if incoming.numel():
        requests.append(torch.distributed.irecv(incoming, source))
    if outgoing.numel():
        requests.append(torch.distributed.isend(outgoing, to))
    for request in requests:
        request.wait()


def gather_values(value: Any, world: World) -> list[Any]:
    """Every rank's value (anything that pickles), in rank order; waits as long as it takes."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(values, value, group=_waiting_group)
    return values


def sum_over_ranks(values: torch.Tensor, world: World) -> torch.Tensor:
    """The sum of every rank's tensor, which is overwritten."""
    if world.size > 1:
        torch.distributed.all_reduce(values)
    return values


def wait_for_all(world: World) -> None:
    """Until every rank calls this, as long as it takes."""
    if world.size > 1:
        torch.distributed.barrier(group=_waiting_group)


class StopRequest:
    """SIGTERM and SIGUSR1 (and the death of the deepspeed launcher) ask for a stop at a step that all ranks
    agree on; and so do moments that pass on any rank.

    The answer of a step is the one that was asked for two steps before: a device that is still at the step
    before need not be waited for. So a run ends at most two steps later than it was asked to.

    Within `with`; afterwards the signals are given back.
    """

    def __init__(self, device: torch.device, *, answers: Answers | None = None) -> None:
        self._asked = False
        self._device = device
        self._answers = answers or (DeviceAnswers() if device.type == "cuda" else HostAnswers())
        self._pending: deque[Any] = deque()
        self._previous = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        self._command = _deepspeed_command()

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def agreed(self, *have_passed: bool) -> tuple[bool, ...]:
        """Whether any rank was asked to stop, and for each moment whether it had passed on any rank, two
        steps ago; to be called by every rank once a step, with as many moments each time."""
        # The deepspeed command does not pass SIGTERM on; its death is the only thing that the ranks can see.
        if self._command is not None and _deepspeed_command() != self._command:
            self._asked = True
        flags = (self._asked, *have_passed)
        on_device = torch.zeros(len(flags), device=self._device)
        for number in (number for number, flag in enumerate(flags) if flag):
            on_device[number].fill_(1)  # by a kernel: a copy from the host would wait for the step
        work = torch.distributed.all_reduce(on_device, torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending.append(self._answers.begin(on_device, work))
        if len(self._pending) <= _STEPS_BACK:
            return (False,) * len(flags)
        return tuple(flag > 0 for flag in self._answers.read(self._pending.popleft()))

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        while self._pending and kind is None:  # after an error no rank may answer
            self._answers.read(self._pending.popleft())
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Answers(Protocol):
    """How numbers that a collective leaves on a device come to the host, later."""

    def begin(self, flags: torch.Tensor, work: Any) -> Any:
        """Take the collective's tensor, and give a ticket for `read`."""

    def read(self, ticket: Any) -> list[float]:
        """The numbers; waits until they are there."""


class HostAnswers:
    """The tensor is on the host: nothing is copied."""

    def begin(self, flags: torch.Tensor, work: Any) -> tuple[torch.Tensor, Any]:
        return flags, work

    def read(self, ticket: tuple[torch.Tensor, Any]) -> list[float]:
        flags, work = ticket
        work.wait()
        numbers: list[float] = flags.tolist()
        return numbers


class DeviceAnswers:
    """The tensor is on a GPU: a copy to pinned memory is queued, and an event says when it is there."""

    def __init__(
        self, *, new_event: Callable[[], Any] | None = None, pinned: Callable[..., torch.Tensor] | None = None
    ) -> None:
        self._new_event = new_event or torch.cuda.Event
        self._pinned = pinned or partial(torch.empty, pin_memory=True)

    def begin(self, flags: torch.Tensor, work: Any) -> tuple[torch.Tensor, Any]:
        work.wait()  # the stream waits, the host does not
        on_host = self._pinned(flags.shape)
        on_host.copy_(flags, non_blocking=True)
        event = self._new_event()
        event.record()
        return on_host, event

    def read(self, ticket: tuple[torch.Tensor, Any]) -> list[float]:
        on_host, event = ticket
        event.synchronize()
        numbers: list[float] = on_host.tolist()
        return numbers


def _deepspeed_command() -> int | None:
    """The process id of the `deepspeed` command, above DeepSpeed's launcher of this node; None under other
    launchers."""
    parent = Path("/proc") / str(os.getppid())
    try:
        if b"deepspeed.launcher.launch" not in (parent / "cmdline").read_bytes():
            return None
        return int((parent / "stat").read_text(encoding="latin-1").rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None
