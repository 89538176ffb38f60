from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds import commands
from mlpmem_ds.core.config import option
from mlpmem_ds.core.files import publish_json, sha256_of_file
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.inspection.contents import read_run
from mlpmem_ds.stages.inspection.origins import INPUTS, dependents_of, read_made

from ...core import toy_stage


def make(root: Path, *, source: Path | None = None, **flags: str) -> Path:
    """A toy stage, made from `source`'s manifest and started with these flags too."""
    input_hash = "i" if source is None else sha256_of_file(source / "manifest.json")
    toy_stage.run(toy_stage.Config(output=root), World(), input_hash=input_hash)
    described = json.loads((root / "run.json").read_text())
    described["config"] |= flags
    publish_json(root / "run.json", described)
    return root


def names_from(run: Path, name: str) -> list[str]:
    made = {one.name: one for one in read_made(run)}
    return [one.name for one in dependents_of(made[name], list(made.values()))]


def test_what_was_made_from_what_by_manifests_and_by_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    corpus = make(run / "corpus")
    make(run / "base")
    keys = make(run / "keys", source=corpus, model="run/base")
    index = make(run / "index", source=keys)
    targets = make(run / "targets", source=index, keys=str(keys))
    make(run / "memory", source=targets)
    (run / "export").mkdir()
    inputs = {"memory": sha256_of_file(run / "memory" / "manifest.json"), "vocabulary": "v"}
    publish_json(run / "export" / "mlpmem_export.json", {"inputs": inputs, "files": []}, seal=True)
    monkeypatch.chdir(tmp_path)
    after_keys = ["export", "memory", "targets", "index"]  # the last of the pipeline first
    assert names_from(run, "keys") == after_keys
    assert names_from(run, "corpus") == names_from(run, "base") == [*after_keys, "keys"]
    assert names_from(run, "export") == []
    monkeypatch.chdir("/")
    assert names_from(run, "base") == [*after_keys, "keys"]  # as seen from where the run directory lies


def test_what_lies_deep_is_found_as_inspect_run_finds_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    memory = make(run / "memory")
    report = make(run / "of" / "two" / "texts" / "and" / "seeds" / "report", source=memory)
    export = run / "exports" / "v1"
    export.mkdir(parents=True)
    inputs = {"memory": sha256_of_file(memory / "manifest.json")}
    publish_json(export / "mlpmem_export.json", {"inputs": inputs, "files": []}, seal=True)
    (run / "latest").symlink_to(report)
    found = {state.name for state in read_run(run, checksums=False)}
    assert found == {one.name for one in read_made(run)}
    assert found == {"memory", "of/two/texts/and/seeds/report", "exports/v1"}
    assert set(names_from(run, "memory")) == found - {"memory"}


def test_a_stage_without_its_manifest_is_known_by_its_log(tmp_path: Path) -> None:
    keys = make(tmp_path / "keys")
    make(tmp_path / "index", source=keys)
    (keys / "manifest.json").unlink()  # a unit is being mended
    assert names_from(tmp_path, "keys") == ["index"]


def test_a_report_is_from_the_gates_of_its_arms_also_where_the_run_was_moved(tmp_path: Path) -> None:
    gate = make(tmp_path / "gate")
    report = make(tmp_path / "report", gate="/of/another/machine/gate")
    assert names_from(tmp_path, "gate") == []
    arms = [{"settings": {"gate": sha256_of_file(gate / "manifest.json")}}]
    publish_json(report / "eval.json", {"arms": arms})
    assert names_from(tmp_path, "gate") == ["report"]


def test_a_word_of_a_flag_is_no_directory_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "run" / "auto")
    make(tmp_path / "run" / "memory", preset="auto", attention="auto", split="auto")
    monkeypatch.chdir(tmp_path / "run")
    assert names_from(tmp_path / "run", "auto") == []


def takes_path(field: dataclasses.Field[Any], hint: object) -> bool:
    """By its type, or by what the help shows for its value, as of NAME=DIR, which is a text."""
    shown = re.search("DIR|PATH|FILE", field.metadata["metavar"] or "")
    return bool(field.metadata["by_url"] or "Path" in str(hint) or shown)


def test_a_text_that_holds_a_path_is_known_for_one() -> None:
    @dataclasses.dataclass
    class Config:
        arms: tuple[str, ...] = option("arms", (), metavar="NAME=PATH")
        words: tuple[str, ...] = option("words", ())

    assert [takes_path(field, str) for field in dataclasses.fields(Config)] == [True, False]


def test_the_inputs_are_the_flags_of_all_commands_that_take_paths() -> None:
    named = set()
    for command in vars(commands).values():
        if isinstance(command, commands.Command):
            config = commands._load(command.config)
            hints = typing.get_type_hints(config)
            fields = [field for field in dataclasses.fields(config) if field.name in hints]
            named |= {one.name for one in fields if takes_path(one, hints[one.name])}
    written = {"output", "lists", "copy_to", "html", "prometheus"}
    assert named - written - {"run"} <= INPUTS and not INPUTS & written


def test_what_a_stage_wrote_is_not_what_it_was_made_from(tmp_path: Path) -> None:
    make(tmp_path / "lists")
    make(tmp_path / "targets", lists=str(tmp_path / "lists"), copy_to=str(tmp_path / "lists"))
    assert names_from(tmp_path, "lists") == []


def test_directories_that_name_each_other_do_not_loop(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    make(tmp_path / "a", model=str(tmp_path / "b"))
    make(tmp_path / "b", model=str(tmp_path / "a"))
    assert names_from(tmp_path, "a") == ["b"] and names_from(tmp_path, "b") == ["a"]
