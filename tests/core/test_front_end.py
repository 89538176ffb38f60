import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlpmem_ds.core import front_end
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.front_end import keep_bars_to_terminals, run_front_end
from mlpmem_ds.core.log import EventLog, read_events
from mlpmem_ds.core.termination import Terminated
from mlpmem_ds.core.world import World

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    number: int = option("a number", 1)


PRELUDE = r"""
import sys, time, os, signal
from dataclasses import dataclass
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.front_end import run_front_end
@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    number: int = option("a number, \N{GREEK SMALL LETTER LAMDA} \N{RIGHTWARDS ARROW}", 1)
"""


def started(run: str, *words: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A process of a front-end with this `run`; `shell` gets its command as "$@"."""
    code = f"{PRELUDE}\ndef run(config, world):\n{textwrap.indent(run, '    ')}\n"
    code += "sys.exit(run_front_end(Config, run, prog='look'))"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell, "bash", *command] if shell else command,
        capture_output=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=60,
    )


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "environment", [ASCII, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}]
)
def test_a_terminal_that_is_not_utf_8_gets_escapes(environment: dict[str, str]) -> None:
    done = started(r"return '\u03bb = 1'", **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u03bb = 1\n", b"")
    help_text = started("pass", "--help", **environment)
    assert help_text.returncode == 0 and b"\\u03bb \\u2192" in help_text.stdout and not help_text.stderr
    refused = started(r"open('/n\xf6ne\udce9/x')", **environment)
    assert refused.returncode == 2 and refused.stderr.startswith(b"error: "), refused.stderr
    assert refused.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ('"$@" | true', 141, b""),
        ('"$@" | (read -r line; echo "$line" >&2)', 141, b"word word"),
        ('"$@" >&-', 0, b""),
        ('"$@" <&- >&- 2>&-', 0, b""),
        ('"$@" > /dev/full', 2, b"error: No space left on device"),
        ('"$@" --wrong 2>&-', 2, b""),
    ],
)
def test_streams_that_are_closed_or_full(shell: str, code: int, said: bytes) -> None:
    done = started("return ('word ' * 9 + '\\n') * 40000", shell=shell)
    assert done.returncode == code and done.stderr[:999].startswith(said), done.stderr
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, b"stopped by SIGTERM"), (signal.SIGINT, 130, b"interrupted")],
)
def test_signals_end_with_a_line(number: int, code: int, said: bytes) -> None:
    run = f"try:\n    os.kill(os.getpid(), {int(number)}); time.sleep(50)\nfinally:\n    print('tidied')"
    done = started(run)
    assert done.returncode == code and said in done.stderr and done.stderr.count(b"\n") == 1
    assert done.stdout == b"tidied\n"


def run_with(error: BaseException | None, *words: str) -> int:
    def run(config: Config, world: World) -> None:
        if error is not None:
            raise error

    return run_front_end(Config, run, argv=list(words))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (UserError("use --other"), 2, "error: use --other"),
        (DamagedDataError("file x"), 2, "file x"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "free some space"),
        (OSError(errno.EIO, "Input/output error", "/x"), 2, "check it"),
        (MemoryError(), 2, "memory ran out"),
        (KeyboardInterrupt(), 130, "continues where it was"),
    ],
)
def test_exit_codes(
    error: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(error) == code
    assert said in capsys.readouterr().err


def fail_below() -> None:
    raise KeyError("no such key")


def run_with_fault(config: Config, world: World) -> None:
    fail_below()


def test_a_fault_of_ours_is_a_line_and_its_traceback_is_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_front_end(Config, run_with_fault, argv=[], prog="mlpmem-look") == 1
    (line,) = capsys.readouterr().err.rstrip("\n").split("\n")
    (path,) = tmp_path.iterdir()
    assert line.startswith("error: 'no such key' (KeyError in ") and "test_front_end.py:" in line
    assert line.endswith(f"this is a fault of mlpmem-ds, please report it with {path}")
    assert "in fail_below" in path.read_text() and "mlpmem-look" in path.read_text()


@dataclass(frozen=True, kw_only=True)
class StageConfig(Flags):
    output: Path = option("directory")


def test_the_traceback_of_a_stage_is_in_its_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    (tmp_path / "log.jsonl").touch()
    assert run_front_end(StageConfig, run_with_fault, argv=["--output", str(tmp_path)]) == 1
    assert f"report it with {tmp_path / 'traceback-3.txt'}" in capsys.readouterr().err
    assert "in fail_below" in (tmp_path / "traceback-3.txt").read_text()


def test_without_a_place_for_a_file_the_traceback_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    assert run_front_end(Config, run_with_fault, argv=[]) == 1
    assert "please report it with this:\nTraceback" in capsys.readouterr().err


def test_an_error_of_a_thread_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(config: Config, world: World) -> str:
        thread = threading.Thread(target=fail_below)
        thread.start()
        thread.join()
        return "the end"

    assert run_front_end(Config, run, argv=[]) == 0
    said = capsys.readouterr()
    assert said.out == "the end\n" and said.err.count("\n") == 1 and "KeyError" in said.err


def test_the_deepspeed_launchers_flag_is_ignored() -> None:
    assert run_with(None, "--local_rank=1", "--number", "2") == 0


def test_libraries_draw_their_bars_on_terminals_only() -> None:
    on_terminal: dict[str, str] = {}
    in_log: dict[str, str] = {}
    asked_for = {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    keep_bars_to_terminals(on_terminal, is_terminal=True)
    keep_bars_to_terminals(in_log, is_terminal=False)
    keep_bars_to_terminals(asked_for, is_terminal=False)
    assert (on_terminal, in_log) == ({}, {"HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    assert asked_for == {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}


def test_what_ends_a_begun_stage_is_in_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def end_with(error: BaseException, *, begins: bool) -> int:
        def run(config: StageConfig, world: World) -> None:
            if begins:
                EventLog(config.output / "log.jsonl", world).begin(world=1)
            raise error

        return run_front_end(StageConfig, run, argv=["--output", str(tmp_path)])

    endings = [UserError("--k 9 is too large: choose 8"), KeyboardInterrupt(), Terminated(), KeyError("x")]
    codes = [end_with(ending, begins=True) for ending in endings]
    assert end_with(UserError("refused"), begins=False) == 2  # leaves the disk as it was
    events = [event for event in read_events(tmp_path / "log.jsonl") if event["event"] == "ended"]
    assert codes == [event["code"] for event in events] == [2, 130, 143, 1]
    assert events[0]["message"] == "--k 9 is too large: choose 8"
    said = capsys.readouterr().err
    assert all(f"error: {event['message']}\n" in said for event in events)


def test_a_refusal_is_said_also_where_nothing_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse_removal(output: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(output))

    def run(config: StageConfig, world: World) -> None:
        raise UserError("--k 9 is too large: choose 8")

    monkeypatch.setattr(front_end, "withdraw", refuse_removal)
    assert run_front_end(StageConfig, run, argv=["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --k 9 is too large: choose 8\n"
