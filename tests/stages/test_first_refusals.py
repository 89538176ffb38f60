"""Every command refuses a wrong input, and ranks that cannot find each other, before it writes anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.commands import COMMANDS, Command, _load
from mlpmem_ds.core.config import Flags, flag_name, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World

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
