"""Slurm itself on the hosts of hosts.py: its controller on the first, its daemon on each, jobs in two
partitions, of which `urgent` takes nodes from `main`.

The programs are those of this machine, or of $MLPMEM_SLURM, where fetch_slurm.sh has put them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .hosts import REPOSITORY, Cluster, Host

_COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
_DAEMONS = ("slurmctld", "slurmd", "slurmstepd")
_SECONDS_TO_START = 60.0
_SECONDS_IN_QUEUE = 3.0
_ENDS = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
_CORES = 4  # of a node, however many the machine has
_SETTINGS = """
ClusterName=rehearsal
SlurmctldHost={first}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=20
MinJobAge=3000
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str | None:
    """What is missing to start Slurm here; None where nothing is."""
    missing = [name for name in (*_COMMANDS, *_DAEMONS) if _program(name) is None]
    if not missing:
        return None
    return f"no {missing[0]} here: bash tests/cluster/fetch_slurm.sh DIR, and MLPMEM_SLURM=DIR"


def _root() -> Path:
    return Path(os.environ.get("MLPMEM_SLURM") or "/")


def _program(name: str) -> Path | None:
    """Debian calls the daemons of this package slurmd-wlm and so on."""
    places = [_root() / folder / f"{name}{end}" for folder in ("usr/bin", "usr/sbin") for end in ("", "-wlm")]
    return next((place for place in places if place.is_file()), None)


class Slurm:
    """The queue of a cluster of hosts; commands are typed on the first host."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.folder = cluster.folder / "slurm"
        self._first = cluster.hosts[0]

    def start(self) -> None:
        """Returns when every node may have jobs."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        programs = self._programs()
        (plugins,) = {path.parent for path in programs.rglob("auth_none.so")}
        libraries = f"{plugins.parent}:{plugins}"
        for name in (*_COMMANDS, *_DAEMONS):
            program = _program(name)
            assert program is not None
            wrapper = self.cluster.folder / "bin" / name
            wrapper.write_text(
                f"#!/bin/sh\nexport SLURM_CONF={self.folder}/slurm.conf LD_LIBRARY_PATH={libraries}\n"
                f'exec {programs / program.relative_to(_root())} "$@"\n',
                encoding="utf-8",
            )
            wrapper.chmod(0o755)
        nodes = "\n".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs={_CORES}" for host in self.cluster.hosts
        )
        text = _SETTINGS.format(first=self._first.name, plugins=plugins, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        self._start_daemon(self._first, "slurmctld", "-D", "-c")
        for host in self.cluster.hosts:
            self.start_node(host)
        self.wait_until(lambda: self.run("sinfo", "--noheader", "-N", "-o", "%T")[1].split(), ["idle"])

    def start_node(self, host: Host) -> None:
        """Its daemon, also again after the host was off."""
        (self.folder / f"spool-{host.name}").mkdir(exist_ok=True)
        stepd = _program("slurmstepd")
        assert stepd is not None
        self._start_daemon(
            host, "slurmd", "-D", "-N", host.name, "-d", str(self._programs() / stepd.relative_to(_root()))
        )

    def _programs(self) -> Path:
        """Where the hosts see the programs: their /tmp is their own."""
        if _root() == Path("/"):
            return _root()
        place = self.cluster.folder / "slurm-programs"
        if not place.exists():
            shutil.copytree(_root() / "usr", place / "usr", symlinks=True)
        return place

    def _start_daemon(self, host: Host, *words: str) -> None:
        with open(self.folder / f"{words[0]}-{host.name}.out", "a", encoding="utf-8") as stream:
            host.start(list(words), directory=self.folder, stdout=stream, stderr=stream)

    def run(self, *words: str, **variables: str) -> tuple[int, str]:
        """Exit code and output of a command in the repository, on the first host."""
        return self._first.run(list(words), directory=REPOSITORY, environment=variables)

    def states(self) -> dict[str, str]:
        """Name of a job → its state, such as PENDING, RUNNING, COMPLETED, FAILED, CANCELLED; the newest of
        a name."""
        _, said = self.run("squeue", "--noheader", "--states=all", "--sort=i", "--format=%j %T")
        return dict(line.split() for line in said.splitlines())

    def job(self, name: str) -> str:
        """The number of the newest job of this name."""
        words = ["squeue", "--noheader", "--states=all", "--sort=i", f"--name={name}", "--format=%A"]
        _, said = self.run(*words)
        return said.split()[-1]

    def wait_for(self, name: str, state: str, *, timeout: float = _SECONDS_TO_START) -> None:
        """Until the newest job of this name is in this state. One that goes back into the queue starts after
        some seconds, where Slurm would let it wait for two minutes; sooner, its nodes would not take it."""

        def look() -> str:
            seen = self.states().get(name, "")
            if seen == "PENDING" != state:
                time.sleep(_SECONDS_IN_QUEUE)
                self.run("scontrol", "update", f"JobId={self.job(name)}", "StartTime=now")
            assert seen == state or seen not in _ENDS, f"{name} is {seen}, not {state}: {self._logs()}"
            return seen

        self.wait_until(look, state, timeout=timeout)

    def wait_until(
        self, look: Callable[[], object], expected: object = True, *, timeout: float = _SECONDS_TO_START
    ) -> None:
        """Look until what is seen is as expected; a list stands for all of its values being that one."""
        deadline = time.monotonic() + timeout
        while True:
            seen = look()
            if isinstance(seen, list) and isinstance(expected, list):
                if seen and set(seen) == set(expected):
                    return
            elif seen == expected:
                return
            assert time.monotonic() < deadline, f"still {seen}, not {expected}: {self._logs()}"
            time.sleep(0.5)

    def _logs(self) -> str:
        paths = [*self.folder.glob("*.log"), *self.cluster.directory.glob("*/slurm/*.log")]
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in paths)


@contextlib.contextmanager
def start_slurm(cluster: Cluster) -> Iterator[Slurm]:
    """Its daemons end with the hosts."""
    slurm = Slurm(cluster)
    slurm.start()
    yield slurm
