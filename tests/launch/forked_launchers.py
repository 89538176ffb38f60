"""`python`, `torchrun` and `deepspeed` for a script's test: the first start of each is the real one, later
ones are forks.

Run as a process of its own with a directory: it fills the directory with the three commands, says so on
standard output, and serves them until it is killed. A fork gets the command's words, directory, environment
and standard streams, runs the front-end as `__main__`, and differs from the real start by the seconds of its
imports only.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

# One forks; the real one comes first. `mkdir` succeeds once.
_COMMAND = """#!/bin/sh
if mkdir "{directory}/started-{name}" 2>/dev/null; then exec "{real}" "$@"; fi
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
        return words, [{}], False
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
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
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
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def join(pids: list[int]) -> int:
    """The first exit code that is not 0, whose siblings are then killed, as launchers do; else 0."""
    failed = 0
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code if code > 0 else 128 - code
            for other in pids:
                os.kill(other, signal.SIGKILL)
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
            own = [*words, f"--local_rank={number}"] if is_told else words
            os._exit(run(own, directory, {**environment, **variables}, streams))
        pids.append(pid)
    for stream in streams:
        os.close(stream)
    question.sendall(str(join(pids)).encode())


def serve(directory: Path) -> None:
    os.chdir(directory)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    listener.listen()
    (directory / "ask.py").write_text(_ASK.format(directory=str(directory)))
    for name in ("python", "torchrun", "deepspeed"):
        real: Any = sys.executable if name == "python" else Path(sys.executable).with_name(name)
        path = directory / name
        path.write_text(_COMMAND.format(directory=directory, name=name, real=real, python=sys.executable))
        path.chmod(0o755)
    print("ready", flush=True)
    while True:
        question, _ = listener.accept()
        with question:
            answer(question)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import warm_start  # noqa: F401

    serve(Path(sys.argv[1]))
