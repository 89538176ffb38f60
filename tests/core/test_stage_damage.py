"""Damaged files of a stage's directory: made again, mended or refused."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.commands import inspect_run
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World

from .toy_stage import UNITS, Config, result_of, run


def test_a_flipped_byte_costs_one_unit(tmp_path: Path, straight: dict[str, str]) -> None:
    config = Config(output=tmp_path / "flipped")
    run(config, World())
    path = config.output / "part-2.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run(config, World()) == ["2"]
    assert result_of(config.output) == straight


def test_a_damaged_record_costs_one_unit(tmp_path: Path, straight: dict[str, str]) -> None:
    config = Config(output=tmp_path / "record")
    run(config, World())
    (config.output / "done" / "1.json").write_text("{")
    assert run(config, World()) == ["1"]
    assert result_of(config.output) == straight


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["manifest.json", "done/2.json", "identity.json"])
def test_a_flipped_digit_of_our_own_notes_is_mended_by_the_same_command(
    tmp_path: Path, straight: dict[str, str], name: str
) -> None:
    """Each of them still parses; that of the record would say that the unit has other bytes when made
    again."""
    config = Config(output=tmp_path / "toy")
    run(config, World())
    path = config.output / name
    flip(path, path.read_bytes().index({"identity.json": b"corpus"}.get(name, b"sha256")) + 10)
    assert run(config, World()) == (["2"] if name == "done/2.json" else [])
    assert result_of(config.output) == straight


def test_a_damaged_identity_is_written_anew_only_where_the_units_were_made_for_it(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    with pytest.raises(RuntimeError):
        run(config, World(), fail_at="3")
    for harm in ("not valid", "missing"):
        if harm == "missing":
            (config.output / "identity.json").unlink()
        else:
            (config.output / "identity.json").write_text("{")
        with pytest.raises(
            DamagedDataError, match=rf"identity\.json is {harm}.*or remove .*toy to start anew"
        ):
            run(Config(output=tmp_path / "toy", factor=3), World())
    assert run(config, World()) == ["3", "4"]

    open_stage(tmp_path / "new", stage="toy", version=1, config=config, inputs={}, world=World())
    (tmp_path / "new" / "identity.json").write_text("{")
    run(Config(output=tmp_path / "new", factor=3), World())  # nothing was made yet
    assert "3" in (tmp_path / "new" / "identity.json").read_text()


def test_a_damaged_unit_that_comes_out_different_is_refused(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    run(config, World())
    (config.output / "part-2.npy").write_bytes(b"")
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={"corpus": "i"}, world=World()
    )
    for _ in range(2):  # also the second time: the old record still says what it was
        with pytest.raises(DamagedDataError, match="has other bytes") as caught:
            directory.run_units(UNITS, lambda unit, writer: writer.array(f"part-{unit}.npy", np.zeros(9)))
        assert not directory.manifest_path.exists()
    (command,) = re.findall(r"inspect_run\.py (\S+ --discard \S+ --yes)", str(caught.value))
    directory.log.finish()  # as a command that ends says
    assert inspect_run(command.split()) == 0  # the new bytes are accepted, and no other unit is made
    assert directory.run_units(UNITS, lambda unit, writer: writer.array("part-2.npy", np.zeros(9))) == 1


def test_a_damaged_unit_that_others_here_are_made_from_is_not_accepted_alone(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    directory = open_stage(config.output, stage="toy", version=1, config=config, inputs={}, world=World())
    directory.run_phase(["codec"], lambda unit, writer: writer.array("codec.npy", np.ones(9)))
    (config.output / "codec.npy").write_bytes(b"")
    with pytest.raises(DamagedDataError, match=r"the other units here and .* --discard toy/codec --yes"):
        directory.run_phase(["codec"], lambda unit, writer: writer.array("codec.npy", np.zeros(9)))


def test_a_damaged_unit_is_not_there_until_it_is_made_again(tmp_path: Path, straight: dict[str, str]) -> None:
    """Another rank must not complete the directory meanwhile, and does not make again what was just
    mended."""
    config = Config(output=tmp_path / "toy")
    run(config, World())
    (config.output / "part-2.npy").write_bytes(b"")
    first, second = (
        open_stage(
            config.output,
            stage="toy",
            version=1,
            config=config,
            inputs={"corpus": "i"},
            world=World(rank=rank, size=2),
        )
        for rank in range(2)
    )
    seen: list[bool] = []

    def compute(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        second.complete(UNITS, lambda: {"total": 10}, afterwards=lambda: pytest.fail("not complete"))
        seen.append(second.manifest_path.exists())
        writer.array(f"part-{unit}.npy", np.arange(4) * int(unit) * config.factor)
        return {"sum": int(unit)}

    first.run_units(UNITS, compute)
    assert seen == [False]
    assert not second._maker.make("2", compute) and seen == [False]
    calls: list[str] = []
    first.complete(UNITS, lambda: {"total": 10}, afterwards=lambda: calls.append("complete"))
    assert calls == ["complete"]
    assert result_of(config.output) == straight


def test_waiting_sees_through_a_record_whose_file_is_damaged(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    run(config, World())
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={"corpus": "i"}, world=World()
    )
    directory._wait(UNITS, until_whole=True)
    good = (config.output / "part-1.npy").read_bytes()
    (config.output / "part-1.npy").write_bytes(good[:-1])
    repair = threading.Timer(0.5, lambda: (config.output / "part-1.npy").write_bytes(good))
    repair.start()
    start = time.monotonic()
    directory._wait(UNITS, until_whole=True)
    assert time.monotonic() - start > 0.2
    repair.join()
