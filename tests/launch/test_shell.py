"""The scripts from a stranger's shell: `sh` for bash, a directory with an odd name, unset variables."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts alone, in a directory whose name holds what shells treat."""
    root = tmp_path / 'it\'s "a" dir ü $x * [a]'
    for folder in ("launch", "tools", "tests"):
        (root / folder).mkdir(parents=True)
        for path in (ROOT / folder).glob("*.sh"):
            shutil.copy(path, root / folder)
    return root


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """In the root directory, without HOME and TMPDIR."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "TMPDIR", "PYTHONPATH")}
    return subprocess.run(
        list(map(str, words)),
        cwd="/",
        env={**kept, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
def test_any_shell_may_start_them(shell: str, checkout: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    shown = run(shell, checkout / "launch" / "demo.sh", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("The whole pipeline"), shown.stderr
    refused = run(shell, checkout / "launch" / "setup.sh", PYTHON="/none/python")
    assert refused.returncode == 2 and refused.stderr.startswith("error: no /none/python"), refused.stderr
    refused = run(shell, checkout / "tests" / "run.sh", PYTHON="/none/python")
    assert refused.returncode == 2 and refused.stderr.startswith("error: no /none/python"), refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--corpus", ""], "--corpus is empty: is a variable unset?"),
        (["--corpus", "/proc", ""], "--corpus is empty: is a variable unset?"),
        (["--run", ""], "--run is empty: is a variable unset?"),
        (["--base", ""], "--base is empty: is a variable unset?"),
        (["--run", "--no-setup"], "--run needs a value"),
        (["--seed"], "--seed needs a value"),
        (["--ranks", "two"], "--ranks two is not a number"),
        (["--corpus", "/no such dir"], "--corpus /no such dir does not exist"),
        (["--rnaks", "2"], "unknown option --rnaks"),
    ],
)
def test_wrong_words_of_the_demo_are_refused(words: list[str], said: str, checkout: Path) -> None:
    done = run("bash", checkout / "launch" / "demo.sh", *words)
    assert done.returncode == 2 and done.stderr == f"error: {said}" + done.stderr.partition(said)[2]
    assert not (checkout / "runs").exists()


def test_a_user_without_a_name_has_an_environment(tmp_path: Path) -> None:
    """In a container, or where the servers of names are down: `id -un` fails, and under `set -e` the job."""
    nameless = ("unshare", "--user", "--map-user=54321", "bash", "-euc")
    if shutil.which("unshare") is None or run(*nameless, "true").returncode:
        pytest.skip("no user namespaces here")
    script = f"! id -un &> /dev/null; source '{ROOT}/launch/env.sh'; echo $TRITON_CACHE_DIR"
    shown = run(*nameless, script, TMPDIR=str(tmp_path), TRITON_CACHE_DIR="")
    assert (shown.returncode, shown.stdout) == (0, f"{tmp_path}/mlpmem-54321/triton\n"), shown.stderr


_PYTHON = """#!/usr/bin/env bash
case "$*" in
    --version) echo "Python {version}" ;;
    "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip"*) [ -z "${{NO_PIP:-}}" ] ;;
    *) exec "{real}" "$@" ;;
esac
"""


@pytest.fixture
def environment(checkout: Path) -> Path:
    """A `.venv` of Python 3.11 in the checkout, with a package of the user's; `python3` is 3.12 by now."""
    for place, version in ((".venv/bin/python", "3.11.9"), ("commands/python3", "3.12.1")):
        path = checkout / place
        path.parent.mkdir(parents=True)
        path.write_text(_PYTHON.format(version=version, real=sys.executable))
        path.chmod(0o755)
    for name in ("requirements.txt", "pyproject.toml"):
        (checkout / name).write_text(f"{name}\n")
    needed = [
        (checkout / name).read_bytes() for name in ("requirements.txt", "pyproject.toml", "launch/setup.sh")
    ]
    (checkout / ".venv/bin/activate").touch()
    (checkout / ".venv/of the user").touch()
    stamp = hashlib.sha256(b"".join([b"Python 3.11.9\n", *needed])).hexdigest()
    (checkout / ".venv/installed.sha256").write_text(f"{stamp}\n")
    return checkout / ".venv"


def set_up(environment: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    root = environment.parent
    path = f"{root / 'commands'}:{os.environ['PATH']}"
    return run("bash", root / "launch" / "setup.sh", **{"PATH": path, "PYTHON": "", **variables})


def test_an_environment_stays_in_a_shell_with_another_python(environment: Path) -> None:
    done = set_up(environment)
    assert (done.returncode, done.stderr) == (0, "")
    (environment.parent / "requirements.txt").write_text("newer\n")
    done = set_up(environment)
    assert done.returncode == 0 and "Ready" in done.stderr, done.stderr
    assert (environment / "of the user").exists() and set_up(environment).stderr == ""


@pytest.mark.parametrize("python", ["python3", ""])
def test_an_environment_is_made_anew_with_a_chosen_python_or_where_its_own_is_gone(
    environment: Path, python: str
) -> None:
    if not python:
        (environment / "bin" / "python").write_text("#!/no/interpreter\n")
    done = set_up(environment, PYTHON=python)
    assert done.returncode == 0, done.stderr
    assert not (environment / "of the user").exists()


def test_an_environment_without_pip_is_not_thrown_away(environment: Path) -> None:
    """As uv makes it."""
    (environment / "installed.sha256").unlink()
    done = set_up(environment, NO_PIP="1")
    assert done.returncode == 2 and "error: .venv has no pip" in done.stderr
    assert (environment / "of the user").exists()


def test_two_set_ups_do_not_write_one_environment(environment: Path) -> None:
    if shutil.which("flock") is None:
        pytest.skip("no flock")
    stamp = (environment / "installed.sha256").read_text()
    (environment / "installed.sha256").unlink()
    with open(environment.parent / ".venv.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        script = ["bash", environment.parent / "launch" / "setup.sh"]
        process = subprocess.Popen(
            script, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHON": ""}
        )
        assert process.stderr is not None and "Another set-up" in process.stderr.readline()
        (environment / "installed.sha256").write_text(stamp)
    assert process.communicate(timeout=60) == (None, "") and process.returncode == 0
