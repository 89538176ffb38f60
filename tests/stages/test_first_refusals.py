"""Every command refuses a wrong input, and ranks that cannot find each other, before it writes anything."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.commands import COMMANDS, Command, _load
from mlpmem_ds.core.config import Flags, flag_name, option, parse_config
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.base.config import Config as BaseConfig

WRITERS = {
    name: command
    for name, command in COMMANDS.items()
    if isinstance(command, Command)
    and any(field.name == "output" for field in dataclasses.fields(_load(command.config)))
}
# Flags that have to be given and are no paths, or that a command asks for beyond its parser.
WORDS = {"tokenizer": ["train:300"], "epochs": ["1"], "kind": ["continued"], "match_parameters": ["1000"]}
WORDS["wheel"] = ["missing.whl"]  # pip would fetch one
LAUNCHES = {
    "one process": {},
    "ranks without MASTER_ADDR": {"RANK": "0", "WORLD_SIZE": "2"},
    "mpirun over hosts": {
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    },
}


def words_of(command: Command, output: Path) -> Iterator[str]:
    """Every flag that has to be given, its files missing."""
    for field in dataclasses.fields(_load(command.config)):
        defaults = (field.default, field.default_factory)
        has_default = any(default is not dataclasses.MISSING for default in defaults)
        if field.name == "output":
            yield from ("--output", str(output))
        elif field.name == "exchange":
            yield from ("--exchange", "torch")
        elif not has_default or field.name in WORDS:
            yield from (flag_name(field.name), *WORDS.get(field.name, [str(output.parent / "missing")]))


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_before_a_refusal(
    name: str,
    launch: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable, value in LAUNCHES[launch].items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    try:
        code: Any = WRITERS[name](list(words_of(WRITERS[name], tmp_path / "out")), prog=name)
    except SystemExit as parser:  # flags that do not fit each other
        code = parser.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("error: ") == 1, said
    assert list(tmp_path.iterdir()) == []


SPREADERS = {
    "extract-keys": "--model MISSING --corpus MISSING --output OUT",
    "fit-gate": "--model MISSING --memory MISSING --corpus MISSING --output OUT",
    "evaluate": "--model MISSING --corpus MISSING --output OUT",
    "generate": "--model MISSING --prompt a --html OUT",
    "run-lm-eval": "--model MISSING --tasks a --output OUT",
}


def test_the_commands_that_spread_a_base_over_gpus_are_these() -> None:
    commands = {name: command for name, command in COMMANDS.items() if isinstance(command, Command)}
    assert SPREADERS.keys() == {
        name
        for name, command in commands.items()
        if any(field.name == "device_map" for field in dataclasses.fields(_load(command.config)))
    }


@pytest.mark.parametrize("name", SPREADERS)
def test_ranks_of_one_host_do_not_each_spread_a_base_over_its_gpus(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MISSING": str(tmp_path / "missing"), "OUT": str(tmp_path / "out.html")}
    words = [places.get(word, word) for word in SPREADERS[name].split()]
    for variable, number in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, number)

    def said(local_size: int, *flags: str) -> str:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
        assert COMMANDS[name]([*words, *flags], prog=name) == 2
        assert list(tmp_path.iterdir()) == []
        return capsys.readouterr().err

    for value in ("auto", "balanced", "balanced_low_0", "sequential"):
        refusal = said(2, "--device-map", value)
        assert refusal.startswith(f"error: --device-map {value} spreads a base over all GPUs"), refusal
        assert "several ranks: start one on each host" in refusal and refusal.count("\n") == 1
    for other in (said(1, "--device-map", "auto"), said(2, "--device-map", "none"), said(2)):
        assert "several ranks" not in other and other.count("error: ") == 1  # of what is missing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Flags):
    output: Path = option("directory")
    refused: str = option("unit", "1", identity="none")


def run(config: Config, world: World) -> None:
    stage = open_stage(config.output, stage="toy", version=1, config=config, inputs={}, world=world)

    def write(unit: str, writer: UnitWriter) -> dict[str, Any]:
        if unit == config.refused:
            raise UserError("its text cannot be read: give another")
        writer.file("x")
        return {}

    stage.run_units(["1", "2"], write)


def test_what_the_first_unit_finds_out_leaves_nothing_either(tmp_path: Path) -> None:
    """Of what only reading tells: a number that is not finite, a text without a token, no network."""
    words = ["--output", str(tmp_path / "toy")]
    assert run_front_end(Config, run, argv=words, prog="toy") == 2
    assert list(tmp_path.iterdir()) == []
    assert run_front_end(Config, run, argv=[*words, "--refused", "2"], prog="toy") == 2
    assert (tmp_path / "toy" / "done" / "1.json").is_file()


def test_no_seed_is_negative() -> None:
    """It is a key of hashes of unsigned numbers."""
    seeds = {
        name: field.metadata["bounds"].get("at least")
        for name, command in COMMANDS.items()
        if isinstance(command, Command)
        for field in dataclasses.fields(_load(command.config))
        if field.name == "seed"
    }
    assert len(seeds) >= 7 and set(seeds.values()) == {0}, seeds


def test_a_number_of_steps_is_read_as_every_whole_number(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--corpus", "c", "--output", "o", "--validate-every"]
    assert parse_config(BaseConfig, [*words, "1e3"], prog="x").validate_every == 1000
    assert parse_config(BaseConfig, [*words, "epoch"], prog="x").validate_every == "epoch"
    never = [*words, "none", "--early-stopping-patience", "none", "--select", "last"]
    assert parse_config(BaseConfig, never, prog="x").validate_every is None
    with pytest.raises(SystemExit):
        parse_config(BaseConfig, [*words, "1.5"], prog="x")
    assert "argument --validate-every: '1.5' is no whole number, such as" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("answer-questions", "--questions", "q.jsonl", "--model", "CONFIG", "--output", "OUT"),
        ("generate", "--prompt", "a", "--model", "CONFIG"),
        ("extract-keys", "--corpus", "CORPUS", "--model", "CONFIG", "--output", "OUT"),
        ("convert-checkpoint", "--checkpoint", "CONFIG", "--output", "OUT"),
        ("plan", "--positions", "10", "--model", "CONFIG"),
        ("plan", "--positions", "10", "--calibrate", "RUN"),
        ("train-baseline", "--kind", "lora", "--match-memory", "CONFIG", *("--model", "BASE"),
         "--batch-tokens", "64", "--corpus", "CORPUS", "--output", "OUT", "--ds-config", "cpu.json"),
        ("evaluate", "--control", "x=CONFIG", "--model", "BASE", "--corpus", "CORPUS", "--output", "OUT"),
        ("evaluate", "--control", "base+x=CONFIG", "--model", "BASE", "--corpus", "CORPUS", "--output=OUT"),
        ("evaluate", "--memory", "CONFIG", "--model", "BASE", "--corpus", "CORPUS", "--output", "OUT"),
        ("train", "--init-from", "CONFIG", "--corpus", "CORPUS", "--keys", "KEYS", "--alpha", "0",
         "--output", "OUT", "--ds-config", "cpu.json"),
    ],
)  # fmt: skip
def test_json_that_is_no_object_is_named(
    words: tuple[str, ...],
    base_dir: Path,
    corpus_dir: Path,
    keys_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A configuration, or run.json, that holds a list."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("[]")
    (tmp_path / "q.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    shutil.copytree(keys_dir, tmp_path / "run" / "keys")
    (tmp_path / "run" / "keys" / "run.json").write_text("[]")
    places = {
        "CONFIG": tmp_path / "model",
        "RUN": tmp_path / "run",
        "BASE": base_dir,
        "CORPUS": corpus_dir,
        "KEYS": keys_dir,
        "OUT": tmp_path / "out",
        "q.jsonl": tmp_path / "q.jsonl",
        "cpu.json": ds_configs() / "cpu.json",
    }
    command, *flags = words
    given = [
        re.sub("[A-Z]{3,}|q.jsonl|cpu.json", lambda found: str(places[found[0]]), word) for word in flags
    ]
    assert COMMANDS[command](given, prog=command) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and (str(tmp_path / "model") in said or "run.json is damaged" in said)
    assert not (tmp_path / "out").exists()
