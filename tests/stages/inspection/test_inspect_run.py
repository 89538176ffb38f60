import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord, publish_json, read_sealed_json, record_file, sha256_of_file
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.inspection import contents
from mlpmem_ds.stages.inspection.inspect_run import Config, run


@pytest.fixture
def run_dir(corpus_dir: Path, keys_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus_dir, tmp_path / "run" / "corpus")
    shutil.copytree(keys_dir, tmp_path / "run" / "keys")
    return tmp_path / "run"


def inspect(run_dir: Path, output: Path) -> dict[str, dict]:
    run(Config(run=run_dir, output=output), World())
    return {Path(state["root"]).name: state for state in json.loads(output.read_text())}


def test_a_good_run_is_complete(run_dir: Path, tmp_path: Path) -> None:
    states = inspect(run_dir, tmp_path / "found.json")
    assert {name: state["complete"] for name, state in states.items()} == {"corpus": True, "keys": True}
    progress = states["keys"]["progress"]
    assert (
        progress["state"] == "complete" and progress["done"] == progress["total"] == states["keys"]["units"]
    )
    assert progress["of"] == "units" and progress["error"] is None and len(progress["ranks"]) == 1
    on_disk = sum(path.stat().st_size for path in run_dir.glob("keys/*.npy"))
    assert states["keys"]["bytes"] > on_disk > 0


@pytest.mark.parametrize("flag", ["output", "prometheus"])
@pytest.mark.parametrize(
    ("place", "said"),
    [("", "is a directory: name a file"), ("no/such/found.prom", "does not exist; make it first")],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(
    run_dir: Path, tmp_path: Path, flag: str, place: str, said: str
) -> None:
    with pytest.raises(UserError, match=f"--{flag} .* {said}"):
        Config(run=run_dir, **{flag: tmp_path / place})


def test_an_unfinished_stage_is_not_damaged(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "keys" / "manifest.json").unlink()
    assert inspect(run_dir, tmp_path / "found.json")["keys"]["complete"] is False


@pytest.mark.parametrize("name", ["manifest.json", "identity.json", "done/000000000256.json"])
def test_a_flipped_digit_of_the_notes_themselves_is_found(run_dir: Path, name: str) -> None:
    victim = run_dir / "keys" / name
    content = bytearray(victim.read_bytes())
    digit = max(place for place, byte in enumerate(content) if chr(byte).isdigit())
    content[digit] ^= 1
    json.loads(content)
    victim.write_bytes(content)
    with pytest.raises(
        DamagedDataError, match=f"{name} is damaged: it does not have the checksum that it carries"
    ):
        run(Config(run=run_dir), World())


@pytest.mark.parametrize(
    "harm",
    ["flip", "truncate", "remove", "manifest", "record", "record removed", "identity", "identity removed"],
)
def test_every_harm_is_found_and_named(run_dir: Path, harm: str) -> None:
    name, message = {
        "manifest": ("manifest.json", "manifest.json is not valid JSON"),
        "record": ("done/000000000256.json", "000000000256.json is not valid JSON"),
        "record removed": (
            "done/000000000256.json",
            "records of 4 files that the manifest names are missing",
        ),
        "identity": ("identity.json", "identity.json is not valid JSON"),
        "identity removed": ("identity.json", "identity.json is missing"),
    }.get(harm, ("values-000000000256.npy", r"unit 000000000256: .*values-000000000256\.npy"))
    victim = run_dir / "keys" / name
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[-1] ^= 4
        victim.write_bytes(content)
    elif "remove" in harm:
        victim.unlink()
    else:
        victim.write_bytes(content[:-3])
    with pytest.raises(
        DamagedDataError, match=f"faults: 1, directories: 1 .*keys: .*{message}.*run its stage again"
    ):
        run(Config(run=run_dir), World())


def test_a_damaged_audit_is_pointed_out(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run_dir / "keys" / "audit.json").write_text("{")
    with caplog.at_level("WARNING"):
        run(Config(run=run_dir), World())
    assert "audit.json is not valid JSON" in caplog.text and "with the --audit of extract_keys" in caplog.text


def test_without_checksums_only_sizes_are_compared(run_dir: Path) -> None:
    victim = run_dir / "keys" / "values-000000000256.npy"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 4
    victim.write_bytes(content)
    run(Config(run=run_dir, checksums=False), World())
    victim.write_bytes(content[:-1])
    with pytest.raises(DamagedDataError, match="values-000000000256"):
        run(Config(run=run_dir, checksums=False), World())


def test_what_has_not_been_made_is_listed(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = run_dir / "keys"
    for name in ("manifest.json", "done/codec.json", "done/000000000512.json"):
        (keys / name).unlink()
    (keys / ".keys-000000000512.npy.vm.1.tmp").write_bytes(b"x")
    (keys / "done" / ".000000000512.claim").write_text("vm 1")
    with caplog.at_level("WARNING"):
        state = inspect(run_dir, tmp_path / "found.json")["keys"]
    assert state["missing"] == ["codec", "000000000512"] and not state["complete"] and not state["faults"]
    for words in (
        "2 units have not been made: codec, 000000000512",
        "1 temporary files",
        "it continues",
        "1 units claim",
    ):
        assert words in caplog.text


def test_of_answers_alone_no_more_units_are_missed_than_there_will_be(run_dir: Path, tmp_path: Path) -> None:
    """Keys of `--train-on answers` have a row for each token of an answer, not for each position."""
    corpus, keys = run_dir / "corpus" / "manifest.json", run_dir / "keys"
    manifest, identity = read_sealed_json(corpus), read_sealed_json(keys / "identity.json")
    manifest["counts"] = "answers"
    manifest["splits"]["train"] |= {"num_answers": 500}
    publish_json(corpus, manifest, seal=True)
    identity["inputs"]["corpus"] = sha256_of_file(corpus)
    publish_json(keys / "identity.json", identity, seal=True)
    for name in ("manifest.json", "done/000000000256.json", "done/000000000512.json"):
        (keys / name).unlink()
    assert inspect(run_dir, tmp_path / "found.json")["keys"]["missing"] == ["000000000256"]


def test_checkpoints_and_exports_are_checked_too(run_dir: Path, tmp_path: Path) -> None:
    def listed(root: Path, name: str, format: str) -> Path:
        root.mkdir(parents=True)
        (root / "weights.bin").write_bytes(b"weights")
        files = [record_file(root, "weights.bin").to_json()]
        publish_json(root / name, {"format": format, "version": 1, "step": 5, "files": files}, seal=True)
        return root / "weights.bin"

    memory = run_dir / "memory"
    shutil.copytree(run_dir / "keys", memory)  # any stage may own checkpoints
    of_checkpoint = listed(memory / "checkpoints" / "step-00000005", "manifest.json", "mlpmem-checkpoint")
    of_export = listed(run_dir / "export", "mlpmem_export.json", "mlpmem-export")
    (memory / "checkpoints" / "step-00000004.damaged").mkdir()
    states = inspect(run_dir, tmp_path / "found.json")
    assert states["step-00000005"]["complete"] and states["export"]["complete"]
    assert states["step-00000005"]["name"] == "memory/checkpoints/step-00000005"
    assert "step-00000004.damaged" in states["memory"]["notes"][0]
    of_checkpoint.write_bytes(b"wEights")
    of_export.unlink()
    with pytest.raises(
        DamagedDataError, match=r"faults: 2, directories: 2 .*missing: convert again.*checksum.*: remove it"
    ):
        run(Config(run=run_dir), World())
    with pytest.raises(DamagedDataError, match="weights.bin"):
        run(Config(run=memory / "checkpoints" / "step-00000005"), World())
    run(Config(run=run_dir / "keys"), World())


def test_a_remade_input_is_pointed_out(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = run_dir / "corpus" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")  # space is no content
    with caplog.at_level("WARNING"):
        run(Config(run=run_dir), World())
    assert "its corpus is not the one in this run directory" in caplog.text


def test_a_strange_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no stage of this project"):
        run(Config(run=tmp_path), World())
    with pytest.raises(UserError, match="not a directory"):
        run(Config(run=tmp_path / "none"), World())


def test_an_export_that_is_being_made_is_not_damaged(run_dir: Path, tmp_path: Path) -> None:
    partial = run_dir / ".export.n7.0123456789ab.12-345.partial"
    partial.mkdir()
    publish_json(partial / "identity.json", {})
    assert set(inspect(run_dir, tmp_path / "found.json")) == {"corpus", "keys"}


def test_a_stage_behind_a_link_is_checked_too(run_dir: Path, tmp_path: Path) -> None:
    """It lies on another file system; a link to what lies here is no second stage, and none leads in
    circles."""
    elsewhere = tmp_path / "scratch" / "keys"
    elsewhere.parent.mkdir()
    shutil.move(run_dir / "keys", elsewhere)
    (run_dir / "keys").symlink_to(elsewhere)
    (run_dir / "latest").symlink_to(run_dir / "keys")
    (elsewhere / "back").symlink_to(run_dir / "corpus")
    (tmp_path / "link").symlink_to(run_dir)
    for place in (run_dir, tmp_path / "link"):
        states = inspect(place, tmp_path / "found.json")
        assert set(states) == {"corpus", "keys"} and all(state["complete"] for state in states.values())
        assert states["keys"]["progress"]["state"] == "complete"
    victim = next(elsewhere.glob("values-*.npy"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(DamagedDataError, match=f"keys: unit .*{victim.name}"):
        run(Config(run=run_dir), World())


def test_a_folder_that_cannot_be_read_is_not_passed_over(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stage that another user owns; the super-user may read all."""
    scan = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "keys":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="keys"):
        run(Config(run=run_dir), World())


def test_a_file_that_cannot_be_read_does_not_keep_the_other_files_from_being_checked(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victims = sorted(run_dir.glob("keys/values-*.npy"))[:2]
    victims[1].write_bytes(victims[1].read_bytes()[:-1])
    look = contents.fault_of_file

    def fault_of_file(root: Path, record: FileRecord, *, checksum: bool) -> str | None:
        if root / record.name == victims[0]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(victims[0]))
        return look(root, record, checksum=checksum)

    monkeypatch.setattr(contents, "fault_of_file", fault_of_file)
    with pytest.raises(DamagedDataError, match=f"faults: 2.*{victims[0].name} cannot be read .Permission"):
        run(Config(run=run_dir), World())
