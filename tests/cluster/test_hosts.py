"""The hosts that stand for a cluster: apart where hosts are, joined by a network, and never left over."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from mlpmem_ds.core.host import is_alive, start_of

from .hosts import HERE, REPOSITORY

SLEEP = ["sleep", "1000"]


def below(pid):
    """The processes that this one and its children have started: (process id, start); of no other process of
    this machine, which may make and end namespaces of its own."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return {(child, start_of(child)) for child in found}


def namespaces_of(processes):
    """Their network namespaces, apart from the one of these tests."""
    found = set()
    for pid, _ in processes:
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
    return found - {os.readlink("/proc/self/ns/net")}


def test_a_host_has_its_own_name_address_processes_and_tmp(new_cluster):
    one, two = new_cluster().hosts
    assert one.run(["hostname"]) == (0, "node1\n")
    assert two.address in two.run(["ip", "-brief", "address"])[1]
    assert two.run(["bash", "-c", "echo mine > /tmp/file && cat /tmp/file"]) == (0, "mine\n")
    assert one.run(["bash", "-c", "cat /tmp/file"])[0] == 1
    sleeping = two.start(SLEEP)
    assert "sleep" not in one.run(["bash", "-c", "cat /proc/[0-9]*/cmdline"])[1]
    assert [process.words for process in two.processes()] == [tuple(SLEEP)] and one.processes() == []
    two.kill()
    assert sleeping.wait() == -9 and two.processes() == []


def test_ssh_runs_a_command_on_another_host_with_its_exit_code(new_cluster):
    one, two, three = new_cluster(3).hosts
    assert one.run(["ssh", "-x", "-o", "BatchMode=yes", "node3", "hostname;", "exit", "7"]) == (7, "node3\n")
    assert two.run(["ssh", "root@node1", "exec", "pwd"]) == (0, f"{one.folder / 'home'}\n")
    assert three.run(["ssh", "node4", "true"])[0] == 255


def test_the_directory_and_the_repository_are_shared(new_cluster):
    shared = new_cluster()
    shared.hosts[0].run(["bash", "-c", "echo written by one > file"])
    assert shared.hosts[1].run(["cat", str(shared.directory / "file")]) == (0, "written by one\n")
    assert shared.hosts[1].run(["ls", str(REPOSITORY / "tests")])[0] == 0


def test_without_a_shared_directory_each_host_sees_its_own_disk_there(new_cluster):
    cluster = new_cluster(shared=False)
    one, two = cluster.hosts
    one.run(["bash", "-c", "echo written by one > file"])
    assert two.run(["cat", str(cluster.directory / "file")])[0] == 1
    assert (one.disk / "file").read_text() == "written by one\n" and not (two.disk / "file").exists()


def test_a_cut_host_is_not_reached_until_its_cable_is_back(new_cluster):
    one, two = new_cluster().hosts
    sleeping = two.start(SLEEP)
    two.cut()
    probe = "import socket; socket.create_connection(('node2', 22), 1)"
    assert one.run([sys.executable, "-c", probe])[0] == 1
    two.mend()
    assert one.run(["ssh", "node2", "hostname"]) == (0, "node2\n")
    assert sleeping.poll() is None  # the host itself went on
    two.kill()
    sleeping.wait()


def test_a_host_that_loses_power_comes_back_under_its_name_with_its_disk_only(new_cluster):
    one, two = new_cluster().hosts
    two.run(["bash", "-c", "echo left > /tmp/file"])
    sleeping = two.start(SLEEP)
    two.power_off()
    assert sleeping.wait(timeout=10) == -9
    two.power_on()
    assert two.run(["ls", "/tmp/file"])[0] == 2
    assert one.run(["ssh", "node2", "hostname"]) == (0, "node2\n")


def test_a_process_that_made_hosts_and_is_killed_leaves_none(new_cluster, tmp_path):
    program = (
        f"import sys, time; sys.path.insert(0, {str(HERE)!r}); from hosts import *\n"
        f"with make_cluster(Path({str(tmp_path / 'other')!r})) as cluster:\n"
        f"    cluster.hosts[0].start({SLEEP}); print('made', flush=True); time.sleep(1000)\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert maker.stdout.readline() == "made\n"
    made = below(maker.pid)
    assert len(namespaces_of(made)) == 3  # two hosts, their switch
    maker.kill()
    maker.communicate()
    deadline = time.monotonic() + 30

    def left():  # a namespace lasts as long as its processes
        return [(pid, start) for pid, start in made if is_alive(pid) and start_of(pid) == start]

    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
