"""What each front-end does: parse, run, exit code. 0 done; 2 the user's to mend, with the remedy; 130
interrupted."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from mlpmem_ds.core.config import ConfigType, parse_config
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.log import set_up_logging
from mlpmem_ds.core.world import World, world_from_environment

_logger = logging.getLogger(__name__)


def keep_bars_to_terminals(environment: MutableMapping[str, str], *, is_terminal: bool) -> None:
    """Draw no progress bars into a log; what the user has set stands.

    Called before transformers and huggingface_hub are imported, for they look once.
    """
    if not is_terminal:
        environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


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


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """For the loading of libraries: Python's garbage collector would look through a million objects again and
    again and find none to free, and once more when the process ends; 1.7 s of a start's 4.2 s."""
    threshold = gc.get_threshold()
    gc.set_threshold(100_000, *threshold[1:])
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)


def run_front_end(
    config_class: type[ConfigType],
    run: Callable[[ConfigType, World], Any],
    *,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> int:
    """Parse the command line, call `run(config, world)`, and turn the outcome into an exit code.

    Args:
        config_class: cheap to import, for `--help` and a wrong flag need no more.
        run: loads what it needs; the text that it returns, if any, is written to standard output.
        argv: the flags; None = those of this process.
        prog: the command's name in the usage line and in messages; None = as the process was called.
    """
    prog = Path(sys.argv[0]).name if prog is None else prog
    keep_bars_to_terminals(os.environ, is_terminal=sys.stderr.isatty())
    words = [word for word in (sys.argv[1:] if argv is None else argv) if not _is_local_rank(word)]
    try:
        config = parse_config(config_class, words, prog=prog)
        world = world_from_environment(os.environ)
        set_up_logging(world, name=prog.replace(".py", ""))
        text = run(config, world)
        if isinstance(text, str):
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
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
