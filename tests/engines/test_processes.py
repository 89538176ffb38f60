"""Where ranks meet, under every launcher; requests to stop, without a device that waits."""

import datetime
import os
import signal

import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines import processes
from mlpmem_ds.engines.processes import DeviceAnswers, StopRequest, meeting_point, store_among

from ..thread_ranks import on_thread_ranks


def test_ranks_agree_where_to_meet():
    world = World(rank=1, size=2, local_rank=1)
    one_host = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "job@1"}
    assert meeting_point(world, one_host) == meeting_point(World(rank=0, size=2), one_host)
    assert meeting_point(world, {"MASTER_ADDR": "there", "MASTER_PORT": "7"}) == ("there", 7)
    assert meeting_point(World(), {})[0] == "127.0.0.1"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        meeting_point(world, {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A command of this name that takes lists of the form NAME,NAME."""
    command = tmp_path / "scontrol"
    command.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && echo "$3" | tr , "\\n"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def test_ranks_of_srun_meet_on_the_first_node_of_their_step(scontrol):
    """It may be a part of the job's nodes. mpirun starts ranks through a step that lacks its own host."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1,node2,node3", "SLURM_JOB_NUM_NODES": "3"}
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node2,node3"}
    step["SLURM_STEP_NUM_NODES"] = "2"
    first, second = World(rank=0, size=2), World(rank=1, size=2)
    address, port = meeting_point(second, {**job, **step})
    assert address == "node2"
    assert meeting_point(first, {**job, **step, "SLURM_PROCID": "0"}) == (address, port)
    on_one = {**step, "SLURM_STEP_NODELIST": "node3", "SLURM_STEP_NUM_NODES": "1"}
    assert meeting_point(second, {**job, **on_one})[0] == "127.0.0.1"

    by_mpirun = {**job, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    daemon = {**step, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    assert meeting_point(first, by_mpirun)[0] == "node1"
    assert meeting_point(second, {**by_mpirun, **daemon, "SLURM_NNODES": "1"})[0] == "node1"


@pytest.mark.parametrize(
    "port", ["tcp://10.0.0.7:8080", "abc", "", "-1", "0", "70000", "8_0", "1.5", "\u0661"]
)
def test_a_port_that_is_none_is_refused_or_of_no_account(port):
    """Kubernetes sets MASTER_PORT in a pod next to a service that is called `master`."""
    environment = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": port}
    address, found = meeting_point(World(), environment)
    assert address == "127.0.0.1" and found > 0, "one rank meets itself"
    if port:
        with pytest.raises(UserError, match="MASTER_PORT=.* is not the number of a port"):
            meeting_point(World(rank=1, size=2, local_rank=1), environment)
    else:
        assert meeting_point(World(rank=1, size=2, local_rank=1), environment)[0] == "10.0.0.7"


def test_ranks_that_are_connected_otherwise_share_a_store(monkeypatch):
    def meet(rank):
        store = store_among(rank.rank, rank.gather)
        store.set(f"here/{rank.rank}", "yes")
        rank.gather(None)
        seen = [store.get(f"here/{other}") for other in range(rank.size)]
        rank.gather(None)
        return seen

    monkeypatch.setattr(processes.socket, "gethostname", lambda: "127.0.0.1")
    assert on_thread_ranks(3, meet) == [[b"yes"] * 3] * 3


def test_where_one_of_them_does_not_reach_it_none_has_it(monkeypatch):
    class Unreachable(RuntimeError):
        pass

    original = torch.distributed.TCPStore

    def new_store(*words, is_master, **settings):
        if not is_master:
            raise Unreachable
        return original(*words, is_master=is_master, **settings)

    monkeypatch.setattr(torch.distributed, "TCPStore", new_store)
    assert on_thread_ranks(2, lambda rank: store_among(rank.rank, rank.gather)) == [None, None]


class FakeWork:
    """A collective that ends when it is waited for."""

    def __init__(self, log, number):
        self.log, self.number = log, number

    def wait(self):
        self.log.append(("waited", self.number))


@pytest.fixture
def played(monkeypatch):
    """all_reduce as if another rank sent the flags that `others` has for a step; what was done, in order."""
    log, others = [], {}

    def all_reduce(flags, operation, async_op):
        assert async_op and operation == torch.distributed.ReduceOp.MAX
        number = sum(entry[0] == "sent" for entry in log)
        flags.copy_(torch.maximum(flags, torch.tensor(others.get(number, [0.0] * len(flags)))))
        log.append(("sent", number))
        return FakeWork(log, number)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return log, others


def test_a_step_is_told_what_was_asked_two_steps_before(played):
    log, others = played
    others[3] = [0.0, 1.0, 0.0]
    handler = signal.getsignal(signal.SIGUSR1)
    answers = []
    with StopRequest(torch.device("cpu")) as request:
        for step in range(8):
            if step == 4:
                signal.raise_signal(signal.SIGUSR1)
            answers.append(request.agreed(False, step >= 5))
            assert len([entry for entry in log if entry[0] == "waited"]) == max(step - 1, 0)
    assert [answer[0] for answer in answers] == [False] * 6 + [True] * 2
    assert [answer[1] for answer in answers] == [False] * 5 + [True] + [False] * 2
    assert [answer[2] for answer in answers] == [False] * 7 + [True]
    assert [entry for entry in log if entry[0] == "waited"] == [("waited", number) for number in range(8)]
    assert signal.getsignal(signal.SIGUSR1) == handler


def test_after_an_error_the_signals_are_given_back_and_no_rank_is_waited_for(played):
    log, _ = played
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopRequest(torch.device("cpu")) as request:
        request.agreed()
        raise RuntimeError("of a step")
    assert [entry for entry in log if entry[0] == "waited"] == []
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_gpu_is_read_through_pinned_memory_two_steps_later(played):
    """No step waits for its own flags: the event that is waited for is that of two steps before."""
    log, others = played
    others[1] = [1.0]

    class FakeEvent:
        count = 0

        def __init__(self):
            self.number, FakeEvent.count = FakeEvent.count, FakeEvent.count + 1

        def record(self):
            log.append(("recorded", self.number))

        def synchronize(self):
            log.append(("read", self.number))

    device_answers = DeviceAnswers(new_event=FakeEvent, pinned=torch.empty)
    with StopRequest(torch.device("cpu"), answers=device_answers) as request:
        answers = [request.agreed() for _ in range(5)]
        assert answers == [(False,), (False,), (False,), (True,), (False,)]
        for step in range(3):
            assert log.index(("recorded", step + 2)) < log.index(("read", step))
    assert [entry[1] for entry in log if entry[0] == "read"] == [0, 1, 2, 3, 4]


def test_hosts_that_do_not_reach_each_other_are_told_so_in_time(monkeypatch):
    """Connecting has a limit, waiting has none: a test of real ranks is in deepspeed/test_zero_state.py."""
    given = []

    def refuse(*, backend, timeout):
        given.append((backend, timeout))
        raise RuntimeError("Gloo connectFullMesh failed")

    monkeypatch.setattr(torch.distributed, "new_group", refuse)
    limit = datetime.timedelta(minutes=10)
    with pytest.raises(UserError, match="rank 1 of 2 .*connectFullMesh failed.*set GLOO_SOCKET_IFNAME"):
        processes.start_waiting_group(World(rank=1, size=2), limit)
    assert given == [("gloo", limit)]
    processes.start_waiting_group(World(), limit)  # one rank waits for no other
    assert len(given) == 1
