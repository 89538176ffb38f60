"""What stands for ssh on the hosts that `hosts.py` makes: over their network, to the host's port 22.

    python remote_shell.py [OPTIONS of ssh, which count for nothing] HOST COMMAND...

Exits with the command's code; with 255, as ssh does, where the host cannot be reached.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import BinaryIO

from host_program import EXIT_CODE, FRAME, SHELL_PORT

_OPTIONS_WITH_A_VALUE = ("-o", "-p", "-l", "-i", "-F")
_SECONDS_TO_CONNECT = 10.0


def main(words: list[str]) -> int:
    while words and words[0].startswith("-"):
        words = words[2 if words[0] in _OPTIONS_WITH_A_VALUE else 1 :]
    host, *command = words
    try:
        connection = socket.create_connection((host.rpartition("@")[2], SHELL_PORT), _SECONDS_TO_CONNECT)
    except OSError as error:
        print(f"ssh: {host}: {error}", file=sys.stderr)
        return 255
    connection.settimeout(None)
    with connection, connection.makefile("rb") as frames:
        connection.sendall(json.dumps(" ".join(command)).encode() + b"\n")
        return relay(frames)


def relay(frames: BinaryIO) -> int:
    while len(head := frames.read(FRAME.size)) == FRAME.size:
        kind, length = FRAME.unpack(head)
        content = frames.read(length)
        if kind == EXIT_CODE:
            return content[0]
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    print("ssh: the connection was closed", file=sys.stderr)
    return 255


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
