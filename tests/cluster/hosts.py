"""Several hosts on one machine: each has its own network address, host name, processes, /tmp and /dev/shm.

    with make_cluster(folder, num_hosts=2) as cluster:
        one, two = cluster.hosts                       # node1 at 10.77.0.1, node2 at 10.77.0.2
        job = two.start(["python", "-m", ...], stdout=stream)
        one.run(["ssh", "node2", "hostname"])          # over their network; mpirun finds this ssh too
        two.cut()                                      # its cable is pulled out; mend() plugs it in again
        two.kill()                                     # -9 to every process; the host itself stays
        two.power_off(); two.power_on()                # without a word to the others; the same name again
        cluster.directory                              # the shared file system, at the same path everywhere

A host is a set of Linux namespaces (network, mounts, host name, processes, IPC), joined to the others by a
veth pair and a bridge. Its process 1 ends when the process that made it does, even by kill -9, and takes
everything on the host with it: nothing can be left over. With `shared=False` each host has its own content
at the path `cluster.directory`, which lies in `host.disk` for who looks from outside.

Needs root, `unshare` and `nsenter` of util-linux and `ip` of iproute2: `why_not()` says what is missing.
Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
NAMES = ("node1", "node2", "node3", "node4")
_NETWORK = "10.77.0"
_NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
_SECONDS_TO_START = 30.0


def why_not() -> str | None:
    """What is missing to make hosts here; None where nothing is."""
    if os.geteuid() != 0:
        return "hosts are namespaces, and only root makes them"
    missing = [name for name in ("unshare", "nsenter", "ip", "mount") if shutil.which(name) is None]
    if missing:
        return f"hosts are namespaces, and {', '.join(missing)} is not installed"
    network = "ip link add br0 type bridge && ip link add veth1 type veth peer name veth2"
    script = f"mount -t proc proc /proc && mount -t tmpfs tmpfs /dev/shm && {network}"
    tried = _try(["unshare", *_NAMESPACES, "--fork", "--kill-child", "sh", "-c", script])
    return None if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.strip()}"


@contextlib.contextmanager
def make_cluster(folder: Path, num_hosts: int = 2, *, shared: bool = True) -> Iterator[Cluster]:
    """Make hosts; on leaving, end all that runs on them and check that nothing is left.

    Args:
        folder: of the hosts' files; made if missing. It stays.
        num_hosts: up to four.
        shared: whether `cluster.directory` is one directory for all hosts, or each has its own there.
    """
    folder = folder.resolve()
    cluster = Cluster(folder, shared=shared)
    try:
        cluster.start(NAMES[:num_hosts])
        yield cluster
    finally:
        cluster.stop()


class Cluster:
    """Hosts and the switch that joins them."""

    def __init__(self, folder: Path, *, shared: bool) -> None:
        self.folder, self.shared = folder, shared
        self.directory = folder / "shared"
        self.hosts: tuple[Host, ...] = ()
        self._switch: _Namespaces | None = None

    def start(self, names: Sequence[str]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write_shell()
        lines = ["127.0.0.1 localhost", *(f"{_address(name)} {name}" for name in names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._switch = _Namespaces.make(
            ["--net"], ["sh", "-c", "echo ready; exec cat"], self.folder / "switch.log"
        )
        self._switch.run("ip", "link", "add", "br0", "type", "bridge")
        self._switch.run("ip", "link", "set", "br0", "up")
        self.hosts = tuple(Host(self, name, self._switch) for name in names)
        for host in self.hosts:
            host.power_on()

    def stop(self) -> None:
        for host in self.hosts:
            if host.is_on:
                host.power_off()
        if self._switch is not None:
            self._switch.end()

    def _write_shell(self) -> None:
        """`ssh` for the PATH of every host."""
        shell = self.folder / "bin" / "ssh"
        shell.parent.mkdir(exist_ok=True)
        shell.write_text(
            f'#!/bin/sh\nexec {sys.executable} {HERE / "remote_shell.py"} "$@"\n', encoding="utf-8"
        )
        shell.chmod(0o755)


class Host:
    """One host; off until `power_on`."""

    def __init__(self, cluster: Cluster, name: str, switch: _Namespaces) -> None:
        self.name, self.address = name, _address(name)
        self.folder = cluster.folder / "hosts_files" / name
        self.disk = self.folder / "disk"
        self.environment = _environment(cluster.folder / "bin", self.folder / "home")
        """of every process that is started on it; for those of `ssh` as it is at `power_on`"""
        self._cluster, self._switch = cluster, switch
        self._inside: _Namespaces | None = None

    @property
    def directory(self) -> Path:
        """`cluster.directory`, as this host sees it."""
        return self._cluster.directory

    @property
    def is_on(self) -> bool:
        return self._inside is not None

    def power_on(self) -> None:
        """With an empty /tmp; what lies on its disk is still there."""
        assert self._inside is None
        tmp, settings = self.folder / "tmp", self.folder / "settings.json"
        shutil.rmtree(tmp, ignore_errors=True)
        for path in (tmp, self.disk, self.folder / "home"):
            path.mkdir(parents=True, exist_ok=True)
        binds = {} if self._cluster.shared else {str(self._cluster.directory): str(self.disk)}
        content = {
            "name": self.name,
            "hosts": str(self._cluster.folder / "hosts"),
            "tmp": str(tmp),
            "binds": binds,
            "kept": _below_tmp([self._cluster.folder, REPOSITORY, *_places_of_python()]),
            "environment": self.environment,
        }
        settings.write_text(json.dumps(content), encoding="utf-8")
        program = [sys.executable, "-S", str(HERE / "host_program.py"), str(settings)]
        self._inside = _Namespaces.make(_NAMESPACES, program, self.folder / "host.log")
        # The same hardware address each time: the others remember it.
        peer = f"eth0 address 02:00:00:00:00:{self.address.rpartition('.')[2]:>02} netns {self._inside.pid}"
        self._switch.run(*f"ip link add {self.name} type veth peer name {peer}".split())
        self._switch.run("ip", "link", "set", self.name, "master", "br0", "up")
        self._inside.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self._inside.run("ip", "link", "set", "eth0", "up")
        self._inside.run("ip", "link", "set", "lo", "up")

    def power_off(self) -> None:
        """At once, as a lost machine: the others hear nothing from it any more."""
        assert self._inside is not None
        self._switch.run("ip", "link", "delete", self.name)
        self._inside.end()
        self._inside = None

    def cut(self) -> None:
        """No packet leaves or reaches it."""
        self._switch.run("ip", "link", "set", self.name, "down")

    def mend(self) -> None:
        self._switch.run("ip", "link", "set", self.name, "up")

    def start(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        **streams: Any,
    ) -> subprocess.Popen[str]:
        """Start a command there.

        Args:
            command: its words; a program of the PATH or a path.
            environment: in addition to `self.environment`.
            directory: where it starts; the cluster's directory by default.
            streams: `stdin`, `stdout`, `stderr` of `subprocess.Popen`.
        """
        assert self._inside is not None, f"{self.name} is off"
        # Not nsenter --wd, which is a directory of who looks from outside.
        words = [*self._inside.entering(), "env", f"--chdir={directory or self._cluster.directory}"]
        env = self.environment | dict(environment or {})
        return subprocess.Popen([*words, *command], env=env, text=True, **streams)

    def run(self, command: Sequence[str], *, timeout: float = 300.0, **options: Any) -> tuple[int, str]:
        """Exit code and output (with that for errors) of a command; options as in `start`."""
        process = self.start(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return process.returncode, output

    def processes(self) -> list[Process]:
        """What runs there, apart from the host's own two processes; an ended one that is not yet collected
        does not."""
        assert self._inside is not None
        space = os.readlink(f"/proc/{self._inside.pid}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")[:-1]
                if words and os.readlink(entry / "ns" / "pid") == space:
                    text = tuple(word.decode(errors="replace") for word in words)
                    found.append(Process(int(entry.name), text))
        own = str(HERE / "host_program.py")
        return [process for process in found if own not in process.words]

    def kill(self) -> None:
        """Kill -9 every process there; the host stays."""
        deadline = time.monotonic() + _SECONDS_TO_START
        while (processes := self.processes()) and time.monotonic() < deadline:
            for process in processes:
                process.kill()
            time.sleep(0.01)
        assert not processes, f"{processes} on {self.name} do not end"


@dataclass(frozen=True)
class Process:
    """A process of a host, by the number that this machine knows it by."""

    pid: int
    words: tuple[str, ...] = field(default=())

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


@dataclass(frozen=True)
class _Namespaces:
    """Namespaces, kept by a program that says `ready` and ends with its standard input."""

    keeper: subprocess.Popen[str]
    kinds: tuple[str, ...]
    pid: int  # of the program

    @classmethod
    def make(cls, kinds: Sequence[str], program: Sequence[str], log: Path) -> _Namespaces:
        with open(log, "w", encoding="utf-8") as errors:
            keeper = subprocess.Popen(
                ["unshare", *kinds, "--fork", "--kill-child", *program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert keeper.stdout is not None
        said = keeper.stdout.readline()
        assert said == "ready\n", f"{program} did not start: {said!r} {log.read_text(encoding='utf-8')}"
        return cls(keeper, tuple(kinds), _child(keeper.pid))

    def entering(self) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *self.kinds, "--"]

    def run(self, *command: str) -> None:
        """A command of this machine's own file system, in the network alone."""
        tried = _try(["nsenter", f"--target={self.pid}", "--net", "--", *command])
        assert tried.returncode == 0, f"{' '.join(command)}: {tried.stderr.strip()}"

    def end(self) -> None:
        """Returns when every process inside has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.keeper.communicate(timeout=_SECONDS_TO_START)


def _try(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_TO_START)


def _environment(programs: Path, home: Path) -> dict[str, str]:
    """No variable of a launcher, and none that names a device."""
    folders = [str(programs), os.path.dirname(sys.executable), os.environ["PATH"]]
    return {
        "PATH": os.pathsep.join(folders),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HOME": str(home),
        "USER": "root",
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _address(name: str) -> str:
    return f"{_NETWORK}.{NAMES.index(name) + 1}"


def _child(pid: int) -> int:
    """The one child of a process."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                return int(entry.name)
    raise AssertionError(f"process {pid} has no child")


def _places_of_python() -> list[Path]:
    named = [sys.prefix, sys.base_prefix, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return [Path(name).resolve() for name in named if name]


def _below_tmp(paths: Sequence[Path]) -> list[str]:
    """Those below /tmp, none of them within another."""
    inside = sorted({path for path in paths if Path("/tmp") in path.parents and path.is_dir()})
    return [str(path) for path in inside if not any(other in path.parents for other in inside)]
