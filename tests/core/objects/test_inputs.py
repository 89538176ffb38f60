"""A command's URLs become local directories before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.config import Flags, has_urls, option
from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.core.objects.cache import PLACE, SIZE
from mlpmem_ds.core.objects.contents import directories_in
from mlpmem_ds.core.objects.inputs import opened_inputs
from mlpmem_ds.core.objects.push import Push
from mlpmem_ds.core.objects.store import Store

from ..toy_stage import result_of


@dataclass(frozen=True, kw_only=True)
class Reader(Flags):
    """Reads."""

    keys: Path = option("a directory", by_url=True)
    control: tuple[str, ...] = option("NAME=DIR", (), by_url=True)
    output: Path | None = option("a local one", None)
    prompt: str | None = option("text", None)


@pytest.fixture
def pushed(memory_url: str, stage_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    Push(directories_in(stage_dir)[0], Store(memory_url)).send()
    monkeypatch.setenv(PLACE, str(tmp_path / "cache"))
    return memory_url


def test_urls_become_directories_and_other_values_stay(pushed: str, stage_dir: Path, tmp_path: Path) -> None:
    config = Reader(
        keys=Path(pushed), control=(f"ce={pushed}", "own=run/own", pushed), prompt="memory://in/a/text"
    )
    assert has_urls(config) and not has_urls(Reader(keys=Path("run/keys"), prompt=pushed))
    with opened_inputs(config, {PLACE: str(tmp_path / "cache")}) as local:
        assert result_of(local.keys) == result_of(stage_dir)
        assert local.control == (f"ce={local.keys}", "own=run/own", str(local.keys))
        assert local.prompt == config.prompt


@pytest.mark.parametrize("form", ["{}", "{}/"])
def test_a_command_reads_a_url(pushed: str, stage_dir: Path, form: str) -> None:
    seen: list[Any] = []

    def read(config: Reader, world: Any) -> None:
        seen.append(result_of(config.keys))

    assert run_front_end(Reader, read, argv=["--keys", form.format(pushed)]) == 0
    assert seen == [result_of(stage_dir)]


def test_a_url_that_cannot_be_read_is_exit_code_2(
    pushed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def code(*argv: str) -> int:
        return run_front_end(Reader, lambda config, world: None, argv=argv, prog="reader")

    assert code("--keys", f"{pushed}/none") == 2
    assert "error: --keys memory://" in capsys.readouterr().err
    monkeypatch.setenv(SIZE, "10")
    assert code("--keys", pushed) == 2
    assert "in the cache" in capsys.readouterr().err


def test_outputs_are_local(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_front_end(Reader, lambda config, world: None, argv=["--keys", "x", "--output", "s3://b/x"])
    assert "is a URL, and this is a local path" in capsys.readouterr().err
