"""`python`, `torchrun` and `deepspeed` as forks of a process that has imported everything.

A real start takes 5 to 15 s of imports; a fork takes milliseconds. It gets the command's words, directory,
environment and standard streams, and runs the file as `__main__`. Who ends the command ends the fork too.

Forked itself from the process server of `conftest._forked`, it fills a directory with the three
commands and serves them until the tests end. What only a real start can show is elsewhere: the launchers'
own words, and ranks that hash strings differently, in tools/test_launchers.py and
stages/training/test_launchers.py.
"""

from __future__ import annotations

import argparse
import atexit
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

_COMMAND = """#!/bin/sh
exec "{python}" -IS "{directory}/ask.py" {name} "$@"
"""
_ASK = """
import json, os, socket, sys
words = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
os.chdir({directory!r})  # a socket's path has 107 characters at most
server = socket.socket(socket.AF_UNIX)
server.connect("socket")
socket.send_fds(server, [len(words).to_bytes(8, "big")], [0, 1, 2])
server.sendall(words)
sys.exit(int(server.recv(8) or b"1"))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks_of(name: str, words: list[str]) -> tuple[list[str], list[dict[str, str]], bool]:
    """(the words after the launcher's own, each rank's variables, whether --local_rank is appended)."""
    if name == "python":
        return [word for word in words[:1] if word != "-u"] + words[1:], [{}], False
    parser = argparse.ArgumentParser(name, allow_abbrev=False)
    parser.add_argument(
        "--nproc-per-node" if name == "torchrun" else "--num_accelerators", type=int, dest="size"
    )
    parser.add_argument("--standalone" if name == "torchrun" else "-q", action="store_true")
    parser.add_argument("--master_port", type=int, default=free_port())
    parser.add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(given.master_port),
        "WORLD_SIZE": str(given.size),
    }
    ranks = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(given.size)]
    return given.words, ranks, name == "deepspeed"


def run(words: list[str], directory: str, environment: dict[str, str], streams: list[int]) -> int:
    """A fork's whole life; the exit code."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    # New objects: those of the server know whether its own streams can seek.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    atexit._clear()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).absolute().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()
        if "mpi4py.MPI" in sys.modules:  # it ends with the interpreter, which a fork leaves out
            sys.modules["mpi4py.MPI"].Finalize()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def join(pids: list[int], question: socket.socket) -> int:
    """The first exit code that is not 0, whose siblings are then killed, as launchers do; else 0.

    Who asked has ended: all are killed.
    """
    failed, running = 0, {os.pidfd_open(pid): pid for pid in pids}
    while running:
        ready, _, _ = select.select([question, *running], [], [])
        for descriptor in ready:
            if descriptor is question:
                code = 1
            else:
                code = os.waitstatus_to_exitcode(os.waitpid(running.pop(descriptor), 0)[1])
                os.close(descriptor)
            if code and not failed:
                failed = code if code > 0 else 128 - code
                for pid in running.values():
                    os.kill(pid, signal.SIGKILL)
        if question in ready:
            break
    return failed


def answer(question: socket.socket) -> None:
    head, streams, _, _ = socket.recv_fds(question, 8, 3)
    text = b""
    while len(text) < int.from_bytes(head, "big"):
        text += question.recv(1 << 20)
    request: tuple[list[str], str, dict[str, str]] = json.loads(text)
    (name, *words), directory, environment = request
    words, ranks, is_told = ranks_of(name, words)
    pids = []
    for number, variables in enumerate(ranks):
        pid = os.fork()
        if pid == 0:
            question.close()
            own = [*words, f"--local_rank={number}"] if is_told else words
            os._exit(run(own, directory, {**environment, **variables}, streams))
        pids.append(pid)
    for stream in streams:
        os.close(stream)
    question.sendall(str(join(pids, question)).encode())


def serve(directory: Path) -> None:
    os.chdir(directory)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    (directory / "ask.py").write_text(_ASK.format(directory=str(directory)))
    for name in ("python", "torchrun", "deepspeed"):
        path = directory / name
        path.write_text(_COMMAND.format(directory=directory, name=name, python=sys.executable))
        path.chmod(0o755)
    listener.listen()
    (directory / "ready").touch()
    parent: Any = multiprocessing.parent_process()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    while True:
        ready, _, _ = select.select([listener, parent.sentinel], [], [])
        if parent.sentinel in ready:
            return
        question, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            try:
                answer(question)
            finally:
                os._exit(0)
        question.close()


if __name__ == "__main__":
    serve(globals()["DIRECTORY"])  # given by who runs this file
