"""The scripts from a stranger's shell: `sh` for bash, a directory with an odd name, unset variables."""

import os
import shutil
import subprocess
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
