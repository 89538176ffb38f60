"""The front-ends as commands, and the wheel: everything that an installed package needs is in it."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mlpmem_ds
from mlpmem_ds import commands

ROOT = Path(__file__).parent.parent
FRONT_ENDS = {path.stem: path for folder in ("tools", "launch") for path in (ROOT / folder).glob("*.py")}


def test_version_configurations_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlpmem-ds {mlpmem_ds.__version__}\n"
    assert commands.main(["--ds-configs"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "zero3.json").is_file()
    assert commands.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name.replace('_', '-')} " in listed for name in FRONT_ENDS)
    assert set(commands.COMMANDS) == {name.replace("_", "-") for name in FRONT_ENDS}
    summaries = [line[22:].strip() for line in listed.partition("commands:\n")[2].splitlines()]
    assert len(set(summaries)) == len(FRONT_ENDS) and all(summary.endswith(".") for summary in summaries)


@pytest.mark.parametrize("words", [["no-such-command"], []])
def test_an_unknown_command_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(words) == 2
    error = capsys.readouterr().err
    assert "usage:" in error and ("no-such-command" in error) == bool(words)


def test_flags_are_checked_without_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["build_index", "--keys", str(tmp_path / "later"), "--output", str(tmp_path / "index")]
    assert commands.main(["--check", *words]) == 0
    assert commands.main(["--check", *words, "--num-shards", "0"]) == 2
    assert "--num-shards must be at least 1" in capfd.readouterr().err
    with pytest.raises(SystemExit) as caught:
        commands.main(["--check", *words, "--num-shard", "2"])
    assert caught.value.code == 2 and "did you mean --num-shards?" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    words[2] = "memory://flags/are/read/and/nothing/is/fetched"
    assert commands.main(["--check", *words]) == 0
    for name in ("bench", "build_inde"):  # nothing to check, and nothing may run
        assert commands.main(["--check", name]) == 2
        assert "not of '" in capfd.readouterr().err


@pytest.mark.parametrize("called", ["python -m", "console"])
def test_a_command_is_its_front_end(
    called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--keys", str(tmp_path / "missing"), "--output", str(tmp_path / "out")]
    if called == "console":
        monkeypatch.setattr(sys, "argv", ["/usr/bin/mlpmem-build-index", *words])
        assert commands.build_index() == 2
    else:
        assert commands.main(["build_index", *words]) == 2
    assert f"--keys {tmp_path / 'missing'} does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        commands.main(["build-index", "--help"])
    assert caught.value.code == 0 and "usage: mlpmem-build-index" in capsys.readouterr().out


def test_deepspeeds_local_rank_may_stand_before_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`deepspeed --module mlpmem_ds train …` starts `python -m mlpmem_ds --local_rank=0 train …`."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    words = [
        "train",
        "--ds_config",
        str(tmp_path / "none.json"),
        "--corpus",
        str(tmp_path),
        "--output",
        str(tmp_path / "o"),
    ]
    assert commands.main(["--local_rank=0", *words]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "no command" not in error and "unrecognized" not in error
    assert not (tmp_path / "o").exists()


def test_the_wheel_holds_commands_configurations_types_and_remote_code(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("mlpmem_ds", "tools", "launch", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (scripts,) = [name for name in names if name.endswith("entry_points.txt")]
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(scripts).decode())
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        described = archive.read(metadata).decode()
    assert f"Version: {mlpmem_ds.__version__}" in described
    needed = [line for line in described.splitlines() if re.match("Requires-Dist: (faiss|mpi4py)", line)]
    builds = {re.sub(".*: ([a-z0-9-]+).*extra == .(\\w+).*", r"\1 \2", line) for line in needed}
    assert builds == {"faiss-cpu cpu", "faiss-gpu-cu12 gpu", "mpi4py mpi"}, "no build of faiss over another"
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mlpmem_ds").rglob("*.py")}
    assert not sources - names, "[tool.setuptools] packages of pyproject.toml"
    assert {"mlpmem_ds/py.typed", "mlpmem_ds/formats/README.md", "mlpmem_ds/ds_configs/zero3.json"} <= names
    tasks = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mlpmem_ds").rglob("*.yaml")}
    assert tasks and tasks <= names, "[tool.setuptools.package-data] of pyproject.toml"
    expected = {f"mlpmem-{name.replace('_', '-')}": f"mlpmem_ds.commands:{name}" for name in FRONT_ENDS}
    assert dict(entry_points["console_scripts"]) == expected, "[project.scripts] of pyproject.toml"
    # As it lies in the wheel, without the checkout: unpacked, it lists its commands, finds its configurations
    # and runs.
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "mlpmem_ds", *words]
        return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)

    assert "train" in run("--help").stdout
    assert run("--ds-configs").stdout == f"{site / 'mlpmem_ds' / 'ds_configs'}\n"
    assert "usage: mlpmem-bench loss" in run("bench", "loss", "--help").stdout
    refused = run("build-index", "--keys", "missing", "--output", "out")
    assert refused.returncode == 2 and "--keys missing does not exist" in refused.stderr


@pytest.mark.parametrize("name", sorted(FRONT_ENDS))
def test_help_loads_no_heavy_library(name: str) -> None:
    script = (
        "import sys\n"
        "from mlpmem_ds import commands\n"
        "try:\n"
        f"    commands.COMMANDS[{name.replace('_', '-')!r}](['--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "print(sorted({'torch', 'transformers', 'faiss', 'deepspeed'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
