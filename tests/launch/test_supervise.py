"""`launch/supervise.sh`: what is started again, what is not, signals, and nothing left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "supervise.sh"
# What a test's command does at each of its starts: an exit code, or the name of a signal that ends it.
COMMAND = r"""
echo start >> starts
what=$(sed -n "$(wc -l < starts)p" plan)
case $what in [0-9]*) exit "$what" ;; *) kill -s "$what" $$ ;; esac
"""


def supervised(
    folder: Path, *words: str, options: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *options, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def outcome(folder: Path, plan: list[str], *options: str) -> tuple[int, int, str]:
    """(exit code, starts, what was said) of a command that ends in these ways, one a start."""
    (folder / "plan").write_text("\n".join([*plan, "0"]) + "\n")
    process = supervised(folder, "bash", "-c", COMMAND, options=options)
    _, said = process.communicate(timeout=60)
    return process.returncode, (folder / "starts").read_text().count("start"), said


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
    return path.read_text()


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("code", ["0", "2", "130", "143"])
def test_what_is_done_refused_or_stopped_is_not_started_again(code: str, tmp_path: Path) -> None:
    assert outcome(tmp_path, [code])[:2] == (int(code), 1)


def test_a_death_by_a_signal_a_lost_rank_and_a_fault_are_started_again(tmp_path: Path) -> None:
    code, starts, said = outcome(tmp_path, ["KILL", "75", "1"])
    assert (code, starts) == (0, 4)
    assert [line.split(" after")[0] for line in said.splitlines()] == [
        f"supervise: exit code {code}" for code in (137, 75, 1)
    ]


def test_rapid_deaths_have_a_limit(tmp_path: Path) -> None:
    code, starts, said = outcome(tmp_path, ["KILL"] * 9, "--max-rapid", "2")
    assert (code, starts) == (137, 2) and "2 starts in a row have lived less than 60 s" in said


def test_numbers_are_decimal_also_with_zeros_in_front(tmp_path: Path) -> None:
    """As clocks and `seq -w` print them; what is left of the command is counted with them."""
    words = ["--grace-seconds", "08", "--rapid-seconds", "009", "--max-rapid", "02"]
    code, starts, said = outcome(tmp_path, ["KILL"] * 9, *words)
    assert (code, starts) == (137, 2) and "have lived less than 9 s" in said and "base" not in said


def test_lives_that_last_are_not_rapid(tmp_path: Path) -> None:
    assert outcome(tmp_path, ["1"] * 3, "--max-rapid", "1", "--rapid-seconds", "0")[:2] == (0, 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "error: no command is given"),
        (["no-such-command"], "error: there is no command no-such-command"),
        (["--rapid", "3", "true"], "error: unknown option --rapid"),
        (["--max-rapid", "few", "true"], "error: --max-rapid few is not a whole number"),
        (["--grace-seconds", "1" * 20, "true"], f"error: --grace-seconds {'1' * 20} is not a whole number"),
    ],
)
def test_wrong_words_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    process = supervised(tmp_path, *words)
    assert process.communicate(timeout=60)[1].startswith(said) and process.returncode == 2


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1"])
def test_a_signal_is_passed_on_and_the_command_is_not_started_again(name: str, tmp_path: Path) -> None:
    command = f"""
import signal, sys, time
signal.signal(signal.SIG{name}, lambda *_: sys.exit(7))
open("ready", "a").write("ready")
time.sleep(60)
"""
    process = supervised(tmp_path, sys.executable, "-c", command)
    wait_for(tmp_path / "ready")
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.communicate(timeout=30)
    assert process.returncode == 7 and (tmp_path / "ready").read_text() == "ready"


def test_usr1_goes_to_the_ranks_for_a_launcher_dies_of_it(tmp_path: Path) -> None:
    rank = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
open("ready", "w").write("ready")
time.sleep(60)
"""
    launcher = f"{sys.executable} -c '{rank}'; echo $? > code; exit 9"
    process = supervised(tmp_path, "bash", "-c", launcher)
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 9 and (tmp_path / "code").read_text() == "0\n"


def test_usr1_ends_a_command_that_does_not_know_it_yet(tmp_path: Path) -> None:
    command = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
open("ready", "w").write("ready")
time.sleep(60)
"""
    process = supervised(tmp_path, sys.executable, "-c", command)
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 5


def test_what_a_launcher_leaves_behind_is_ended_before_the_next_start(tmp_path: Path) -> None:
    """torchrun's ranks have sessions of their own, and outlive a launcher that is killed."""
    command = """
import os, signal, subprocess, sys
if os.path.exists("rank"):
    sys.exit(0)
rank = subprocess.Popen(["sleep", "600"], start_new_session=True)
open("rank", "w").write(str(rank.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = supervised(tmp_path, sys.executable, "-c", command)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert not is_running(int((tmp_path / "rank").read_text()))


def test_the_command_ends_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    if subprocess.run(["setpriv", "--pdeathsig", "TERM", "true"], capture_output=True).returncode:
        pytest.skip("no setpriv, or one that does not know --pdeathsig")
    process = supervised(tmp_path, "bash", "-c", "echo $$ > pid; exec sleep 600")
    pid = int(wait_for(tmp_path / "pid"))
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_rank_that_refuses_ends_it_for_any_code_that_the_launcher_makes_of_that(tmp_path: Path) -> None:
    front_end = f"{sys.executable} {ROOT}/tools/plan.py --no-such-flag || exit 1"
    process = supervised(tmp_path, "bash", "-c", front_end)
    assert "no flag --no-such-flag" in process.communicate(timeout=60)[1] and process.returncode == 2
