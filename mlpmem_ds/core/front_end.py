"""What each front-end does: parse, run, exit code. 0 done; 2 the user's to mend, with the remedy; 130
interrupted.

A front-end imports this file before its stage. While the stage's libraries are loaded the garbage collector
looks through a million objects again and again and finds nothing, and once more when the process ends: 1.7 s
of a start's 4.2 s. So it waits. And where standard error is no terminal, those libraries are told before they
are loaded to draw no progress bars into it.
"""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from mlpmem_ds.core.config import ConfigType, parse_config
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.log import set_up_logging
from mlpmem_ds.core.world import World, world_from_environment

_COLLECTOR = gc.get_threshold()
gc.set_threshold(100_000, *_COLLECTOR[1:])  # until `run_front_end`

_logger = logging.getLogger(__name__)


def keep_bars_to_terminals(environment: MutableMapping[str, str], *, is_terminal: bool) -> None:
    """Tell transformers and huggingface_hub, which look once when they are imported; a user's own word
    stands."""
    if not is_terminal:
        environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


keep_bars_to_terminals(os.environ, is_terminal=sys.stderr.isatty())

_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again: it continues where it was",
    errno.EDQUOT: (
        "raise the quota or free some space and run the same command again: it continues where it was"
    ),
    errno.EACCES: "choose another path or change its permissions",
    errno.EPERM: "choose another path or change its permissions",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "it is a directory: choose another path",
    errno.ENOENT: "make its directory, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EROFS: "choose an --output on a writable file system",
}


def run_front_end(
    config_class: type[ConfigType],
    run: Callable[[ConfigType, World], Any],
    *,
    description: str,
    example: str,
    argv: Sequence[str] | None = None,
    command: str = "",
) -> int:
    """Parse the command line into `config_class`, call `run(config, world)`, and turn the outcome into an
    exit code.

    `command` is the word that was taken off before these flags, for the usage line.
    """
    gc.set_threshold(*_COLLECTOR)
    atexit.register(gc.freeze)
    name = Path(sys.argv[0]).stem
    words = [word for word in (sys.argv[1:] if argv is None else argv) if not _is_local_rank(word)]
    try:
        config = parse_config(
            config_class,
            words,
            prog=f"{Path(sys.argv[0]).name} {command}".rstrip(),
            description=description,
            example=example,
        )
        world = world_from_environment(os.environ)
        set_up_logging(world, name=name)
        run(config, world)
    except UserError as error:
        return _complain(str(error))
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        return _complain(f"{error.strerror}: {error.filename or 'while writing'}; {_REMEDIES[error.errno]}")
    except KeyboardInterrupt:
        _complain("interrupted; the same command continues where it was")
        return 130
    return 0


def _complain(message: str) -> int:
    """Print the message to standard error; the exit code of a user's mistake."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    return 2


def _is_local_rank(word: str) -> bool:
    """The deepspeed launcher appends --local_rank=N, which LOCAL_RANK says too."""
    return word.startswith(("--local_rank=", "--local-rank="))
