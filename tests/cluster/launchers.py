"""The ways to start a command's ranks on several hosts, as the documentation gives them (docs/ranks.md).

Each is a function from the hosts, the command's words and the ranks on each host to the commands to type, and
on which host: `LAUNCHERS[name](hosts, words, ranks_per_host)`.
"""

from __future__ import annotations

import random
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .hosts import Host


@dataclass(frozen=True)
class Start:
    """A command typed on one host."""

    host: Host
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)


Launcher = Callable[[Sequence[Host], Sequence[str], int], list[Start]]


def _port() -> str:
    return str(random.SystemRandom().randrange(20000, 30000))


def torchrun(hosts: Sequence[Host], words: Sequence[str], ranks_per_host: int) -> list[Start]:
    port, num_hosts = _port(), len(hosts)
    own = f"torchrun --nnodes {num_hosts} --nproc-per-node {ranks_per_host} --master-addr {hosts[0].name}"
    return [
        Start(host, [*f"{own} --master-port {port} --node-rank {number}".split(), *words])
        for number, host in enumerate(hosts)
    ]


def variables(
    hosts: Sequence[Host], words: Sequence[str], ranks_per_host: int, python: str = "python"
) -> list[Start]:
    """No launcher at all: each rank's variables, set by hand or by a batch file."""
    port, starts = _port(), []
    for number, host in enumerate(hosts):
        for local_rank in range(ranks_per_host):
            environment = {
                "RANK": str(number * ranks_per_host + local_rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(len(hosts) * ranks_per_host),
                "MASTER_ADDR": hosts[0].name,
                "MASTER_PORT": port,
            }
            starts.append(Start(host, [python, *words], environment))
    return starts


def deepspeed_on_each_host(hosts: Sequence[Host], words: Sequence[str], ranks_per_host: int) -> list[Start]:
    hostfile = _hostfile(hosts, ranks_per_host)
    own = f"deepspeed --hostfile {hostfile} --no_ssh --master_addr {hosts[0].name} --master_port {_port()}"
    return [
        Start(host, [*own.split(), "--node_rank", str(number), *words]) for number, host in enumerate(hosts)
    ]


def deepspeed_openmpi(hosts: Sequence[Host], words: Sequence[str], ranks_per_host: int) -> list[Start]:
    """From the first host, which reaches the others by ssh."""
    hostfile, first = _hostfile(hosts, ranks_per_host), hosts[0].name
    own = f"deepspeed --hostfile {hostfile} --launcher openmpi --master_addr {first}".split()
    return [Start(hosts[0], [*own, f"--launcher_args=--allow-run-as-root -x MASTER_ADDR={first}", *words])]


def mpirun(hosts: Sequence[Host], words: Sequence[str], ranks_per_host: int) -> list[Start]:
    """From the first host, which reaches the others by ssh."""
    slots = ",".join(f"{host.name}:{ranks_per_host}" for host in hosts)
    own = f"mpirun --allow-run-as-root --host {slots} -x MASTER_ADDR={hosts[0].name}"
    return [Start(hosts[0], [*own.split(), "python", *words])]


LAUNCHERS: Mapping[str, Launcher] = {
    "torchrun": torchrun,
    "variables": variables,
    "deepspeed_on_each_host": deepspeed_on_each_host,
    "deepspeed_openmpi": deepspeed_openmpi,
    "mpirun": mpirun,
}


def _hostfile(hosts: Sequence[Host], ranks_per_host: int) -> Path:
    path = hosts[0].directory / "hostfile"
    path.write_text("".join(f"{host.name} slots={ranks_per_host}\n" for host in hosts), encoding="utf-8")
    return path


class Job:
    """Commands that run on several hosts, in a directory that all of them have; what each says is kept."""

    def __init__(self, starts: Sequence[Start], directory: Path, log: Path) -> None:
        self._logs = [log.with_name(f"{log.name}-{number}") for number in range(len(starts))]
        self.starts = list(starts)
        self.processes: list[subprocess.Popen[str]] = []
        for start, path in zip(starts, self._logs, strict=True):
            with open(path, "w", encoding="utf-8") as stream:
                self.processes.append(
                    start.host.start(
                        start.command,
                        environment=start.environment,
                        directory=directory,
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, timeout: float) -> list[int]:
        """Exit codes, in the order of the starts; those of a host that is off are -9.

        Raises:
            AssertionError: some have not ended in `timeout` seconds; with what they have said.
        """
        deadline = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"not ended after {timeout} s: {self.said()}") from None
        return [process.returncode for process in self.processes]

    def are_running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def some_run(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def said(self, number: int | None = None) -> str:
        """What one of the commands has said so far, or all of them."""
        paths = self._logs if number is None else [self._logs[number]]
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def complete(starts: Sequence[Start], directory: Path, *, timeout: float = 300.0) -> str:
    """Start, wait, and require that all end well; what they said."""
    job = Job(starts, directory, directory.with_name(f"{directory.name}.log"))
    codes = job.wait(timeout)
    assert codes == [0] * len(codes), f"{codes} of {shlex.join(starts[0].command)}:\n{job.said()}"
    return job.said()
