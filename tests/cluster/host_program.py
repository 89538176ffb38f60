"""Process 1 of a host that `hosts.py` makes, and what stands for its sshd. Standard library only.

    python host_program.py SETTINGS.json

Process 1 arranges what this host sees of the file system, says `ready`, and collects ended processes. Its
child answers `remote_shell.py` on port 22, and ends when the standard input closes: then process 1 ends, and
the kernel ends every other process of the host with it, and its namespaces. So no host outlives the process
that made it, however that one ends.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHELL_PORT = 22
OUTPUT, EXIT_CODE = 1, 2
FRAME = struct.Struct("!BI")
"""what kind, how many bytes follow"""


def main(settings_file: str) -> None:
    settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
    arrange_files(settings)
    socket.sethostname(settings["name"])
    print("ready", flush=True)
    server = os.fork()
    if server == 0:
        threading.Thread(target=answer, args=(settings,), daemon=True).start()
        sys.stdin.buffer.read()
        os._exit(0)
    while os.wait()[0] != server:
        pass


def arrange_files(settings: Mapping[str, Any]) -> None:
    """Own /proc, /dev/shm, /tmp and /etc/hosts; `binds` say what else lies where.

    Args:
        settings: `tmp`, a directory for /tmp; `kept`, directories below /tmp that stay visible; `hosts`, the
            file for /etc/hosts; `binds`, from a directory's path on this host to where its content lies.
    """
    mount("-t", "proc", "proc", "/proc")
    mount("-t", "tmpfs", "tmpfs", "/dev/shm")
    mount("--bind", settings["hosts"], "/etc/hosts")
    for place, content in settings["binds"].items():
        mount("--bind", content, place)
    for kept in settings["kept"]:  # before /tmp is another directory
        inside = Path(settings["tmp"]) / Path(kept).relative_to("/tmp")
        inside.mkdir(parents=True, exist_ok=True)
        mount("--rbind", kept, str(inside))
    mount("--rbind", settings["tmp"], "/tmp")


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def answer(settings: Mapping[str, Any]) -> None:
    """Run what `remote_shell.py` of any host asks for, each in a thread."""
    with socket.create_server(("", SHELL_PORT)) as server:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=run_remote, args=(connection, settings), daemon=True).start()


def run_remote(connection: socket.socket, settings: Mapping[str, Any]) -> None:
    """A line with the command comes in; its output and at last its exit code go out, in frames.

    As under sshd, the command sees this host's environment and home, and nothing of who asks.
    """
    with connection, connection.makefile("rb") as lines:
        command = json.loads(lines.readline())
        process = subprocess.Popen(
            ["bash", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=settings["environment"],
            cwd=settings["environment"]["HOME"],
        )
        assert process.stdout is not None
        while content := os.read(process.stdout.fileno(), 1 << 16):
            connection.sendall(FRAME.pack(OUTPUT, len(content)) + content)
        connection.sendall(FRAME.pack(EXIT_CODE, 1) + bytes([process.wait() % 256]))


if __name__ == "__main__":
    main(sys.argv[1])
