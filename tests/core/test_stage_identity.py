"""Which run a directory belongs to: flags and inputs that bind it, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World

from .toy_stage import Config, result_of, run


@dataclass(frozen=True, kw_only=True)
class OtherConfig(Flags):
    depth: int = option("depth", 3)


@dataclass(frozen=True, kw_only=True)
class LaterConfig(Config):
    """A later program's: with one flag more."""

    depth: int = option("depth", 7)


def test_a_new_flag_with_its_default_continues_an_old_directory(
    tmp_path: Path, straight: dict[str, str]
) -> None:
    with pytest.raises(RuntimeError):
        run(Config(output=tmp_path / "toy"), World(), fail_at="3")
    assert run(LaterConfig(output=tmp_path / "toy"), World()) == ["3", "4"]
    assert result_of(tmp_path / "toy") == straight
    with pytest.raises(UserError, match=r"\(--depth was 7, now 8\)"):
        run(LaterConfig(output=tmp_path / "toy", depth=8), World())
    run(LaterConfig(output=tmp_path / "other", depth=8), World())
    with pytest.raises(UserError, match=r"\(--depth was 8, now none\)"):  # and an old program a new directory
        run(Config(output=tmp_path / "other"), World())


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Flags):
    output: Path = option("directory")
    search: str = option("auto, exact or ivf", "auto", identity="resolved")
    nprobe: int = option("lists, with ivf", 32, identity="resolved")


def test_a_resolved_flag_decides_by_what_the_stage_made_of_it(tmp_path: Path) -> None:
    def open_with(resolved: dict[str, Any], **flags: Any) -> None:
        config = ResolvedConfig(output=tmp_path / "toy", **flags)
        open_stage(
            config.output, stage="toy", version=1, config=config, inputs={}, world=World(), resolved=resolved
        )

    open_with({"search": "exact", "nprobe": 32})
    open_with({"search": "exact", "nprobe": 32}, search="exact", nprobe=9)  # which decides nothing here
    assert read_json(tmp_path / "toy" / "identity.json")["config"] == {"search": "exact"}
    with pytest.raises(UserError, match=r"\(--nprobe was 32, now 9; --search was 'exact', now 'ivf'\)"):
        open_with({"search": "ivf", "nprobe": 9})
    for incomplete in ({}, {"search": "exact"}, {"search": "exact", "nprobe": 32, "output": "x"}):
        with pytest.raises(AssertionError, match="too many or missing"):
            open_with(incomplete)


def test_one_command_may_write_directories_that_different_flags_decide(tmp_path: Path) -> None:
    def open_with(factor: int) -> None:
        config = LaterConfig(output=tmp_path, factor=factor, depth=9)
        open_stage(
            tmp_path / "toy",
            stage="toy",
            version=1,
            config=config,
            inputs={},
            world=World(),
            flags=("depth",),
        )

    open_with(5)
    assert read_json(tmp_path / "toy" / "identity.json")["config"] == {"depth": 9}
    open_with(6)


def test_another_run_is_refused_and_says_what_changed(tmp_path: Path) -> None:
    run(Config(output=tmp_path / "toy"), World())
    before = result_of(tmp_path / "toy")
    with pytest.raises(UserError, match=r"--output .*\(--factor was 2, now 3\)"):
        run(Config(output=tmp_path / "toy", factor=3), World())
    with pytest.raises(UserError, match=r"inputs\.corpus was 'i', now 'j'"):
        run(Config(output=tmp_path / "toy"), World(), input_hash="j")
    assert result_of(tmp_path / "toy") == before
    assert run(Config(output=tmp_path / "toy", threads=4), World()) == []


def test_a_strangers_directory_or_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        run(Config(output=tmp_path / "theirs"), World())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        run(Config(output=tmp_path / "file"), World())
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.tex"]


def test_the_output_of_another_stage_is_refused_by_its_name(tmp_path: Path) -> None:
    run(Config(output=tmp_path / "toy"), World())
    before = result_of(tmp_path / "toy")
    with pytest.raises(UserError, match="holds mlpmem-toy, not mlpmem-keys: choose another directory$"):
        open_stage(tmp_path / "toy", stage="keys", version=1, config=OtherConfig(), inputs={}, world=World())
    assert result_of(tmp_path / "toy") == before
