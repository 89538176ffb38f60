"""What each front-end does: parse, run, exit code; and the one place where errors end."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.caches import move_caches
from mlpmem_ds.core.config import ConfigType, Flags, has_urls, parse_config, refuse_shared_host
from mlpmem_ds.core.errors import LOST_RANK, REFUSED, UserError
from mlpmem_ds.core.faults import describe_fault, is_lost_rank, remedy_of
from mlpmem_ds.core.log import forget_begun, log_end, set_up_logging
from mlpmem_ds.core.run_description import withdraw
from mlpmem_ds.core.streams import end_streams, is_left_by_reader, prepare_streams, say
from mlpmem_ds.core.termination import EXIT_CODE, MESSAGE, Terminated, terminated_by_sigterm
from mlpmem_ds.core.world import World, world_from_environment

_LEFT_BY_READER = 141  # as of a program that SIGPIPE ends
_REFUSED_FILE = "MLPMEM_REFUSED"  # launch/supervise.sh sets it to the path of an empty file


def keep_bars_to_terminals(environment: MutableMapping[str, str], *, is_terminal: bool) -> None:
    """Draw no progress bars into a log; what the user has set stands.

    Called before transformers and huggingface_hub are imported, because they look once.
    """
    if not is_terminal:
        environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@dataclass
class Run:
    """What is known so far of the run of a command, for the message when it fails."""

    prog: str
    rank: int = 0
    config: Flags | None = None

    @property
    def folder(self) -> Path | None:
        """The stage's output, if it was begun."""
        output = getattr(self.config, "output", None)
        return output if isinstance(output, Path) and (output / "log.jsonl").is_file() else None


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

    def act(this: Run) -> int:
        keep_bars_to_terminals(os.environ, is_terminal=sys.stderr.isatty())
        move_caches(os.environ)
        config = parse_config(config_class, _own_flags(argv), prog=prog)
        if sys.flags.optimize > 1:
            raise UserError(
                "python -OO (PYTHONOPTIMIZE=2) removes the docstrings that transformers reads: run without"
                " it; -O is possible"
            )
        this.config = config
        world = world_from_environment(os.environ)
        this.rank = world.rank
        refuse_shared_host(config, world)
        set_up_logging(world, name=prog.replace(".py", ""))
        forget_begun()
        try:
            with _local_inputs(config) as local:
                text = run(local, world)
        except UserError:
            output = getattr(config, "output", None)
            if world.size == 1 and isinstance(output, Path) and output.is_dir():
                with contextlib.suppress(OSError):  # what was refused is what is to be said
                    withdraw(output)
            raise
        if isinstance(text, str):
            sys.stdout.write(text + "\n")
        return 0

    return guarded(act, prog=prog)


def check_flags(config_class: type[ConfigType], argv: Sequence[str], *, prog: str) -> int:
    """Parse the command line as `run_front_end` does, and run, fetch and write nothing; the exit code."""

    def act(_: Run) -> int:
        parse_config(config_class, _own_flags(argv), prog=prog)
        return 0

    return guarded(act, prog=prog)


@contextlib.contextmanager
def _local_inputs(config: ConfigType) -> Iterator[ConfigType]:
    """The Config with local directories where its flags name URLs."""
    if not has_urls(config):
        yield config
        return
    from mlpmem_ds.core.objects.inputs import opened_inputs

    with opened_inputs(config, os.environ) as local:
        yield local


def guarded(act: Callable[[Run], int], *, prog: str) -> int:
    """The exit code of `act`; any error becomes one line on standard error, and never a traceback.

    0 or what `act` returns; 2 the user's to mend; 75 another rank is gone; 1 a fault of this package, whose
    traceback is in a file that the line names; 130 Ctrl-C; 143 SIGTERM; 141 who reads the output has gone.
    May be nested.
    """
    prepare_streams()
    this = Run(prog)
    with terminated_by_sigterm(), _thread_errors_in_a_line(this):
        try:
            code = act(this)
        except KeyboardInterrupt:
            code = _end(130, "interrupted; the same command continues where it was")
        except Terminated:
            code = _end(EXIT_CODE, MESSAGE.removeprefix("error: "))
        except SystemExit as left:  # argparse has said what is wrong with a flag
            _tell_supervisor(left.code)
            raise
        except Exception as error:
            code = _complain(error, this)
        finally:
            failed = end_streams()
    if failed is not None and code == 0:
        code = _LEFT_BY_READER if failed.errno == errno.EPIPE else _complain(failed, this)
    _tell_supervisor(code)
    return code


def _complain(error: Exception, this: Run) -> int:
    """Write the error's line to standard error; the exit code."""
    if is_left_by_reader(error):
        return _LEFT_BY_READER
    message = remedy_of(error, memory_flags=this.config.memory_flags if this.config else ())
    if message is not None:
        return _end(LOST_RANK if is_lost_rank(error) else REFUSED, message)
    return _end(1, describe_fault(error, folder=this.folder, rank=this.rank, prog=this.prog))


def _end(code: int, message: str) -> int:
    """Say why the command ends, and leave it in the log of the stage that it began; the exit code."""
    say(f"error: {message}")
    log_end(code, message)
    return code


def _tell_supervisor(code: object) -> None:
    """Say to launch/supervise.sh that no new start would help: a launcher may end with another code."""
    path = Path(os.environ.get(_REFUSED_FILE, ""))
    with contextlib.suppress(OSError):
        if code == REFUSED and path.is_file():  # on this host
            path.write_text("refused\n", encoding="ascii")


@contextlib.contextmanager
def _thread_errors_in_a_line(this: Run) -> Iterator[None]:
    """An error that ends a thread is a line too; the command goes on without that thread."""

    def complain(failed: threading.ExceptHookArgs) -> None:
        if isinstance(failed.exc_value, Exception):
            _complain(failed.exc_value, this)

    former, threading.excepthook = threading.excepthook, complain
    try:
        yield
    finally:
        threading.excepthook = former


def _own_flags(argv: Sequence[str] | None) -> list[str]:
    """The flags (None = those of this process) without --local_rank=N, which the deepspeed launcher appends
    and LOCAL_RANK says too."""
    words = sys.argv[1:] if argv is None else argv
    return [word for word in words if not word.startswith(("--local_rank=", "--local-rank="))]
