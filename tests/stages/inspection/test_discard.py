"""What is thrown away, what stays, and that the same commands make it again as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.claims import claim, holder
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.core.log import EventLog
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.inspection import discard as module
from mlpmem_ds.stages.inspection.inspect_run import Config, run
from mlpmem_ds.stages.keys import extract_keys

from ...core import toy_stage
from .test_origins import make


def discard(run_dir: Path, name: str, **flags: bool) -> None:
    run(Config(run=run_dir, discard=name, **{"yes": True, **flags}), World())


def everything(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): sha256_of_file(path) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """keys → targets → memory, and a corpus that nothing is made from."""
    keys = make(tmp_path / "run" / "keys")
    targets = make(tmp_path / "run" / "targets", source=keys)
    make(tmp_path / "run" / "memory", source=targets)
    make(tmp_path / "run" / "corpus")
    return tmp_path / "run"


def test_it_says_what_would_go_and_removes_nothing_unasked(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = everything(run_dir)
    with caplog.at_level("INFO"):
        discard(run_dir, "targets/2", yes=False)
    assert everything(run_dir) == before
    size = (run_dir / "targets" / "part-2.npy").stat().st_size
    assert f"goes: of targets the units 2: 1 files, {size} bytes" in caplog.text
    assert "goes: memory, made from it, the whole directory: 14 files" in caplog.text
    assert "stays: corpus, keys" in caplog.text and "with --yes" in caplog.text


def test_a_unit_goes_with_what_was_made_from_it_and_comes_back_as_it_was(run_dir: Path) -> None:
    targets, before = run_dir / "targets", everything(run_dir)
    input_hash = sha256_of_file(run_dir / "keys" / "manifest.json")
    discard(run_dir, "targets/2")
    assert not (run_dir / "memory").exists()
    gone = {"targets/manifest.json", "targets/done/2.json", "targets/part-2.npy"}
    now = everything(run_dir)
    kept = {name for name in before if not name.startswith("memory/")}
    assert kept - set(now) == gone
    assert all(now[name] == before[name] for name in now if not name.endswith("log.jsonl"))
    assert toy_stage.run(toy_stage.Config(output=targets), World(), input_hash=input_hash) == ["2"]
    make(run_dir / "memory", source=targets)
    after = everything(run_dir)
    unlike = {name for name in before if before[name] != after.get(name)}
    assert all(name.endswith(("log.jsonl", "run.json")) for name in unlike)


def test_dependents_are_left_where_the_unit_must_come_out_the_same(run_dir: Path) -> None:
    discard(run_dir, "keys/3", keep_dependents=True)
    assert (run_dir / "memory" / "manifest.json").is_file()
    config = toy_stage.Config(output=run_dir / "keys")
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={"corpus": "i"}, world=World()
    )
    with pytest.raises(DamagedDataError, match=r"inspect_run\.py .*run --discard keys/3 --yes"):
        directory.run_units(["3"], lambda unit, writer: writer.array("part-3.npy", np.zeros(9)))
    assert toy_stage.run(config, World()) == ["3"]


def test_other_bytes_are_accepted_by_the_command_that_the_message_names(run_dir: Path) -> None:
    config = toy_stage.Config(output=run_dir / "keys")
    (config.output / "part-3.npy").write_bytes(b"")
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={"corpus": "i"}, world=World()
    )

    def other(unit: str, writer: object) -> None:
        writer.array(f"part-{unit}.npy", np.zeros(9))  # type: ignore[attr-defined]

    with pytest.raises(DamagedDataError) as caught:
        directory.run_units(["3"], other)
    words = str(caught.value).split("inspect_run.py ")[1].split(" --yes")[0].split(" --discard ")
    directory.log.finish()
    discard(Path(words[0]), words[1])
    assert not (run_dir / "targets").exists() and not (run_dir / "memory").exists()
    assert directory.run_units(["3"], other) == 1


def test_a_unit_that_the_others_are_made_from_takes_them_along(tmp_path: Path) -> None:
    config = toy_stage.Config(output=tmp_path / "run" / "toy")
    directory = open_stage(config.output, stage="toy", version=1, config=config, inputs={}, world=World())
    directory.run_phase(["codec"], lambda unit, writer: writer.array("codec.npy", np.ones(9)))
    directory.run_units(["1", "2"], lambda unit, writer: writer.array(f"{unit}.npy", np.ones(9)))
    directory.complete(["codec", "1", "2"], lambda: {})
    discard(tmp_path / "run", "1")
    assert sorted(path.name for path in config.output.glob("*.npy")) == ["2.npy", "codec.npy"]
    discard(tmp_path / "run", "codec")
    assert not list(config.output.glob("*.npy")) and not list((config.output / "done").glob("*"))
    assert (config.output / "identity.json").is_file()


def test_where_the_log_is_lost_all_units_go(run_dir: Path) -> None:
    (run_dir / "memory" / "log.jsonl").unlink()
    discard(run_dir, "memory/2")
    assert not list((run_dir / "memory").glob("*.npy"))
    assert (run_dir / "memory" / "identity.json").is_file() and (run_dir / "targets" / "part-2.npy").is_file()


def test_stages_exports_and_checkpoints_go_whole(run_dir: Path) -> None:
    checkpoint = run_dir / "memory" / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    checkpoint.with_name(f".{checkpoint.name}.former").mkdir()  # of a replacement that was cut off
    discard(run_dir, "memory/checkpoints/step-00000010")
    assert not list(checkpoint.parent.iterdir()) and (run_dir / "memory" / "manifest.json").is_file()
    discard(run_dir, "keys")
    assert sorted(path.name for path in run_dir.iterdir()) == ["corpus"]


def test_what_is_elsewhere_and_has_a_link_here_stays(run_dir: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("keys", "memory"):
        (run_dir / name).rename(shared / name)
        (run_dir / name).symlink_to(shared / name)
    before = everything(shared)
    for name in ("keys", "keys/2", "targets", "memory/2"):  # memory is made from targets
        with pytest.raises(UserError, match=r"is not in .*run: a link leads to .*shared/.*remove the link"):
            discard(run_dir, name)
    assert everything(shared) == before and (run_dir / "targets" / "manifest.json").is_file()
    (tmp_path / "link").symlink_to(run_dir)
    (run_dir / "memory").unlink()
    discard(tmp_path / "link", "targets")  # of the run directory itself a link is as good
    assert sorted(path.name for path in run_dir.iterdir()) == ["corpus", "keys"]
    discard(shared, "memory")
    assert sorted(path.name for path in shared.iterdir()) == ["keys"]


def test_a_process_id_that_is_used_again_is_not_the_process_that_was_killed(run_dir: Path) -> None:
    words = holder(1).split()
    if len(words) < 4:
        pytest.skip("this system does not say when process 1 started")
    host, boot, pid, start = words
    killed = f"{host} {boot} {pid} {int(start) + 7}"
    EventLog(run_dir / "memory" / "log.jsonl", World()).write("started", world=1, process=killed)
    (run_dir / "memory" / "done" / ".2.claim").write_text(killed)
    discard(run_dir, "memory")
    assert not (run_dir / "memory").exists()


def test_names_that_are_none_or_several_are_refused(run_dir: Path) -> None:
    with pytest.raises(UserError, match="corpus/2, keys/2, memory/2, .*: say which"):
        discard(run_dir, "2")
    with pytest.raises(UserError, match="no such unit.*did you mean target"):
        discard(run_dir, "targetz/2")
    with pytest.raises(UserError, match="no such unit"):
        discard(run_dir, "targets/77")


@pytest.mark.parametrize("name", [".", "..", "keys/.."])
def test_a_name_of_no_stage_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(run_dir)
    with pytest.raises(UserError, match="no such unit"):
        discard(Path("."), name)


def test_what_a_replacement_that_was_cut_off_left_is_named(run_dir: Path) -> None:
    checkpoint = run_dir / "memory" / "checkpoints" / "step-00000010"
    former, gone = (checkpoint.with_name(f".{checkpoint.name}.{end}") for end in ("former", "gone"))
    former.mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        discard(run_dir, "memory/checkpoints/step-00000010")
    assert str(caught.value).endswith(
        f": the command that writes {checkpoint.name} puts it back, and to remove it give rm -r {former}"
    )
    former.rename(gone)
    with pytest.raises(UserError, match=rf"what is left of a removal: to remove it give rm -r {gone}"):
        discard(run_dir, "memory/checkpoints/step-00000010/")
    assert gone.is_dir()


@pytest.mark.parametrize("place", ["targets/done/.2.claim", "memory/.manifest.claim"])
def test_a_live_claim_refuses(run_dir: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(run_dir)
    monkeypatch.setattr("mlpmem_ds.core.claims.os.getpid", lambda: 1)  # another process holds it
    with claim(run_dir / place):
        monkeypatch.undo()
        with pytest.raises(UserError, match=rf"{Path(place).name} is held by a live process .* 1 \d+\)"):
            discard(run_dir, "targets/2")
    assert everything(run_dir) == before


def test_a_claim_of_another_host_is_watched(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(module, "_SECONDS_OF_CLAIMS", 0.05)
    path = run_dir / "targets" / "done" / ".2.claim"
    path.write_text("n7 boot 12")
    with pytest.raises(UserError, match="may be held"):
        discard(run_dir, "targets/2")
    monkeypatch.setattr("mlpmem_ds.core.claims._SECONDS_UNTIL_DEAD", 0.02)
    monkeypatch.setattr(module, "_SECONDS_OF_CLAIMS", 5.0)
    discard(run_dir, "targets/2")
    assert not (run_dir / "targets" / "part-2.npy").exists()


@pytest.mark.parametrize(("process", "message"), [("n7 boot 12", "gave a sign of life"), ("", "at work")])
def test_a_rank_that_did_not_say_that_it_ended_refuses(run_dir: Path, process: str, message: str) -> None:
    (run_dir / "memory" / "manifest.json").unlink()
    log = EventLog(run_dir / "memory" / "log.jsonl", World(rank=1, size=2))
    log.write("started", world=2, process=process or holder(1))
    with pytest.raises(UserError, match=f"rank 1 of memory .*{message}"):
        discard(run_dir, "targets/2")
    assert (run_dir / "targets" / "part-2.npy").exists()
    log.write("ended", code=2, message="m")
    discard(run_dir, "targets/2")


def test_a_checkpoint_stays_while_its_training_runs(run_dir: Path) -> None:
    (run_dir / "memory" / "manifest.json").unlink()
    checkpoint = run_dir / "memory" / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    log = EventLog(run_dir / "memory" / "log.jsonl", World())
    log.write("started", world=1, process=holder(1))
    with pytest.raises(UserError, match="rank 0 of memory is at work"):
        discard(run_dir, "memory/checkpoints/step-00000010")
    with pytest.raises(UserError, match="no such unit"):
        discard(run_dir / "corpus", "../memory/checkpoints/step-00000010")
    assert (checkpoint / "manifest.json").is_file()
    log.write("ended", code=2, message="m")
    discard(run_dir, "memory/checkpoints/step-00000010")
    assert not checkpoint.exists()


@pytest.mark.parametrize("name", ["", "/"])
def test_an_empty_name_is_not_the_whole_directory(run_dir: Path, name: str) -> None:
    """As of a variable of a script that is not set."""
    with pytest.raises(UserError, match="--discard names nothing"):
        discard(run_dir / "corpus", name)
    assert (run_dir / "corpus" / "manifest.json").is_file()


class Cut(Exception):
    """The machine stops."""


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """After so many removals the next one raises."""
    left = [10**9]

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*arguments, **named):  # type: ignore[no-untyped-def]
            if left[0] == 0:
                raise Cut
            left[0] -= 1
            return function(*arguments, **named)

        return call

    for name in ("unlink", "rmdir", "replace"):
        monkeypatch.setattr(f"os.{name}", counted(getattr(module.os, name)))
    monkeypatch.setattr("shutil.rmtree", counted(shutil.rmtree))
    yield left


def test_cut_at_any_moment_the_same_command_goes_on(run_dir: Path, tmp_path: Path, cuts: list[int]) -> None:
    discarded = tmp_path / "once"
    shutil.copytree(run_dir, discarded)
    discard(discarded, "keys/2")
    for moment in range(0, 300, 3):
        copy = tmp_path / f"cut-{moment}"
        shutil.copytree(run_dir, copy)
        cuts[0] = moment
        try:
            discard(copy, "keys/2")
        except Cut:
            cuts[0] = 10**9
            if (copy / "keys" / "done" / "2.json").exists():
                discard(copy, "keys/2")
        else:
            break
        same = {name for name in everything(discarded) if not name.endswith("log.jsonl")}
        left = {name for name in everything(copy) if not name.endswith("log.jsonl")}
        assert left - same <= {"keys/part-2.npy", "keys/done/.2.claim", "keys/.manifest.claim"}, moment
        assert same <= left
    else:
        pytest.fail("it never ran through")
    assert moment > 10


def test_keys_and_their_index_come_back_byte_for_byte(
    corpus_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    keys = extract_keys.Config(
        model=str(base_dir), corpus=corpus_dir, output=tmp_path / "run" / "keys", unit_positions=256
    )
    index = build_index.Config(keys=keys.output, output=tmp_path / "run" / "index", factory="IVF4,PQ4")

    def result() -> dict[str, str]:
        found = everything(tmp_path / "run")
        return {name: sha for name, sha in found.items() if not name.endswith(("log.jsonl", "run.json"))}

    extract_keys.run(keys, World())
    build_index.run(index, World())
    before = result()
    for name in ("keys/000000000256", "keys/codec"):
        discard(tmp_path / "run", name)
        assert not index.output.exists()
        extract_keys.run(keys, World())
        build_index.run(index, World())
        assert result() == before
