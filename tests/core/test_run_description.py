"""A run's identity binds its directory; run.json describes it for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_json, sha256_of_file
from mlpmem_ds.core.run_description import (
    check_output,
    describe_run,
    find_input,
    flags_of_run,
    read_description,
    reason_of_start,
    resolved_at_start,
    settle_identity,
    withdraw,
)
from mlpmem_ds.core.world import World

IDENTITY = {
    "format": "mlpmem-test",
    "version": 1,
    "inputs": {"corpus": "a" * 64},
    "config": {"block_size": 8},
}
DEFAULTS = {"block_size": 4, "seed": 0}


def test_a_path_that_is_not_utf_8_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not UTF-8"):
        check_output(tmp_path / "caf\udce9", stage="toy")
    assert list(tmp_path.iterdir()) == []


def test_the_same_identity_continues_and_a_flag_at_its_default_is_no_difference(tmp_path: Path) -> None:
    settle_identity(tmp_path / "run", IDENTITY, defaults=DEFAULTS)
    settle_identity(tmp_path / "run", IDENTITY, defaults=DEFAULTS)
    settle_identity(tmp_path / "run", {**IDENTITY, "config": {"block_size": 8, "seed": 0}}, defaults=DEFAULTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"block_size": 16}}, "--block-size was 8, now 16"),
        ({"config": {}}, "--block-size was 8, now 4"),
        ({"config": {"block_size": 8, "seed": 3}}, "--seed was 0, now 3"),
        ({"inputs": {"corpus": "b" * 64}}, "inputs.corpus was 'a+', now 'b+'"),
        (
            {"inputs": {f"set{number}": "c" for number in range(9)}},
            r"inputs.set4 was none, now 'c'; and 4 more\)",
        ),
    ],
)
def test_another_run_is_refused_with_the_flag_and_both_values(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    settle_identity(tmp_path / "run", IDENTITY, defaults=DEFAULTS)
    before = (tmp_path / "run" / "identity.json").read_bytes()
    with pytest.raises(UserError, match=message):
        settle_identity(tmp_path / "run", {**IDENTITY, **change}, defaults=DEFAULTS)
    assert (tmp_path / "run" / "identity.json").read_bytes() == before


def test_a_damaged_identity_is_written_anew_only_if_no_unit_of_another_run_is_there(tmp_path: Path) -> None:
    settle_identity(tmp_path / "run", IDENTITY, defaults=DEFAULTS)
    path = tmp_path / "run" / "identity.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    settle_identity(tmp_path / "run", IDENTITY, defaults=DEFAULTS)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:20])
    (tmp_path / "run" / "done").mkdir()
    publish_json(tmp_path / "run" / "done" / "unit.json", {"identity": "0" * 64}, seal=True)
    with pytest.raises(DamagedDataError, match="remove .* to start anew"):
        settle_identity(tmp_path / "run", IDENTITY, defaults=DEFAULTS)


def test_what_a_flag_became_is_read_from_a_whole_identity_alone(tmp_path: Path) -> None:
    assert resolved_at_start(tmp_path / "run", "block_size") is None
    settle_identity(tmp_path / "run", IDENTITY, defaults=DEFAULTS)
    assert resolved_at_start(tmp_path / "run", "block_size") == 8
    assert resolved_at_start(tmp_path / "run", "other") is None
    path = tmp_path / "run" / "identity.json"
    assert resolved_at_start(path, "block_size") is None
    path.write_bytes(path.read_bytes()[:20])
    assert resolved_at_start(tmp_path / "run", "block_size") is None
    assert "first started; now it would be 9" in reason_of_start("9")


@dataclass(frozen=True, kw_only=True)
class Example(Flags):
    output: Path = option("directory")
    seed: int = option("seed", 3)


def test_run_json_has_every_flag_the_world_and_the_versions(tmp_path: Path) -> None:
    description = describe_run(Example(output=tmp_path), World(rank=1, size=4, local_rank=1))
    assert description["config"] == {"output": str(tmp_path), "seed": 3} and description["world"] == 4
    assert {"mlpmem_ds", "python", "torch"} <= set(description["versions"])
    assert read_description(tmp_path) == {}
    publish_json(tmp_path / "run.json", description)
    assert read_description(tmp_path) == json.loads(json.dumps(description))


def begin(output: Path) -> None:
    settle_identity(output, IDENTITY, defaults=DEFAULTS)
    (output / "run.json").touch()
    (output / "log.jsonl").touch()


def test_a_start_that_made_nothing_is_withdrawn_and_leaves_the_disk_as_it_was(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    (tmp_path / "run" / "done").mkdir()
    withdraw(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["done/1.json", "done/.1.former", "keys.npy", "checkpoints/step-1", "manifest.json"]
)
def test_what_was_made_is_not_withdrawn(tmp_path: Path, name: str) -> None:
    begin(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    withdraw(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"identity.json", "run.json", "log.jsonl"}


def test_a_directory_of_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    withdraw(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_hidden_files_that_the_next_start_uses_stay(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    (tmp_path / "run" / ".fetched").mkdir()
    withdraw(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".fetched"]


def _stage(root: Path, **flags: str) -> Path:
    root.mkdir(parents=True)
    publish_json(root / "run.json", {"config": flags})
    (root / "manifest.json").write_text(root.name)
    return root


def test_an_input_is_found_by_the_flags_next_to_the_stage_or_where_it_is_given(tmp_path: Path) -> None:
    keys = _stage(tmp_path / "elsewhere" / "keys")
    sha256 = sha256_of_file(keys / "manifest.json")
    named, memory = _stage(tmp_path / "run" / "named", keys=str(keys)), _stage(tmp_path / "run" / "memory")
    assert flags_of_run(named) == {"keys": str(keys)} and flags_of_run(tmp_path) == {}
    assert find_input(named, "keys", sha256) == keys
    assert find_input(memory, "keys", sha256) is None
    assert find_input(memory, "keys", sha256, given=keys) == keys
    assert find_input(memory, "keys", sha256, given=tmp_path / "missing") is None
    neighbour = _stage(tmp_path / "run" / "keys")
    assert find_input(memory, "keys", sha256) == neighbour


def test_another_directory_of_that_name_is_not_taken(tmp_path: Path) -> None:
    keys, memory = _stage(tmp_path / "keys"), _stage(tmp_path / "memory")
    assert find_input(memory, "keys", "0" * 64, given=keys) is None
    assert find_input(memory, "keys", None) is None
