"""Which files of a directory are mirrored, and which directories of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import content_hash, publish_json, read_sealed_json, record_file
from mlpmem_ds.core.objects.contents import directories_in, is_for_people


def test_all_but_temporary_files_are_named_the_manifest_last(stage_dir: Path) -> None:
    for name in (".part.npy.host.1.tmp", "done/.3.claim", ".hidden/file", "checkpoints/step-00000001/x"):
        (stage_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (stage_dir / name).touch()
    (directory,) = directories_in(stage_dir)
    names = directory.names()
    assert names[-1] == "manifest.json" and directory.name == ""
    assert set(names) == {
        *(f"part-{number}.npy" for number in range(5)),
        *(f"done/{number}.json" for number in range(5)),
        *("identity.json", "log.jsonl", "manifest.json", "run.json"),
    }
    assert [name for name in names if is_for_people(name)] == ["log.jsonl", "run.json"]


def test_a_stage_is_known_by_its_identity_also_before_it_is_complete(stage_dir: Path) -> None:
    (directory,) = directories_in(stage_dir)
    assert directory.kind == "stage" and directory.is_complete
    of = directory.of()
    assert of == content_hash(read_sealed_json(stage_dir / "identity.json"))
    assert directory.recorded()["part-2.npy"] == record_file(stage_dir, "part-2.npy")
    (stage_dir / "manifest.json").unlink()
    assert directory.of() == of and not directory.is_complete and directory.recorded() == {}
    assert [unit.files[0].name for unit in directory.units()] == [f"part-{n}.npy" for n in range(5)]


def test_the_directories_of_a_run_are_mirrored_one_by_one(stage_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("corpus", "memory"):
        shutil.copytree(stage_dir, run / name)
    (run / "export").mkdir()
    step = run / "memory/checkpoints/step-00000010"
    step.mkdir(parents=True)
    publish_json(run / "export" / "mlpmem_export.json", {"format": "mlpmem-export", "files": []}, seal=True)
    publish_json(step / "manifest.json", {"format": "mlpmem-checkpoint", "files": []}, seal=True)
    (run / ".export.n7.0123456789ab.12-345.partial").mkdir()  # a conversion is at work
    publish_json(run / ".export.n7.0123456789ab.12-345.partial" / "identity.json", {})
    (run / "notes").mkdir()
    (run / "notes" / "note.txt").write_text("mine")
    kinds = {directory.name: directory.kind for directory in directories_in(run)}
    assert kinds == {"corpus": "stage", "export": "listed", "memory": "stage"}
    names = [directory.name for directory in directories_in(run, checkpoints=True)]
    assert names == ["corpus", "export", "memory", "memory/checkpoints/step-00000010"]


def test_any_other_directory_is_one_and_known_by_its_content(tmp_path: Path) -> None:
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text("{}")
    (directory,) = directories_in(root)
    of = directory.of()
    assert directory.kind == "plain" and directory.names() == ["config.json"] and directory.is_complete
    (root / "config.json").write_text("[]")
    assert directory.of() != of


@pytest.mark.parametrize("name", ["manifest.json", "identity.json"])
@pytest.mark.parametrize("content", ['{"format": "webmanifest"}', "[1]", "// no JSON"])
def test_a_file_of_our_name_makes_no_directory_ours(tmp_path: Path, name: str, content: str) -> None:
    """Of a model, a page or a data set, alone or next to a stage."""
    root = tmp_path / "run" / "model"
    root.mkdir(parents=True)
    (root / name).write_text(content)
    (root / "weights").write_text("weights")
    (directory,) = directories_in(root)
    assert directory.kind == "plain" and directory.is_complete
    assert directory.names() == sorted([name, "weights"], key=lambda each: each == "manifest.json")
    assert directory.recorded() == {}
    (whole,) = directories_in(root.parent)
    assert whole.kind == "plain" and set(whole.names()) == {f"model/{name}", "model/weights"}
    (root.parent / "keys").mkdir()
    publish_json(root.parent / "keys" / "identity.json", {"format": "mlpmem-keys"}, seal=True)
    assert [found.name for found in directories_in(root.parent)] == ["keys"]


@pytest.mark.parametrize("content", ["", "{", '{"format": "mlpmem-toy"}'])
def test_a_stage_whose_identity_is_damaged_is_not_taken_for_another_directory(
    stage_dir: Path, content: str
) -> None:
    (stage_dir / "identity.json").write_text(content)
    (directory,) = directories_in(stage_dir)
    assert directory.kind == "stage"
    with pytest.raises(DamagedDataError, match=r"identity\.json is "):
        directory.of()


def test_an_export_is_ours_by_a_name_that_no_other_program_gives(tmp_path: Path) -> None:
    """Also where its list is damaged, and next to a manifest of the base's."""
    (tmp_path / "mlpmem_export.json").write_text("{")
    (tmp_path / "manifest.json").write_text("{}")
    (directory,) = directories_in(tmp_path)
    assert directory.kind == "listed"
    with pytest.raises(DamagedDataError, match=r"mlpmem_export\.json is not valid JSON"):
        directory.recorded()


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is no directory"):
        directories_in(tmp_path / "none")


def test_what_lies_behind_links_is_mirrored_too(stage_dir: Path, tmp_path: Path) -> None:
    """A stage on another file system, and a folder of a stage; a link that leads back is passed over."""
    run, folder = tmp_path / "run", tmp_path / "scratch"
    run.mkdir()
    expected = directories_in(stage_dir)[0].names()
    shutil.move(stage_dir / "done", folder)
    (stage_dir / "done").symlink_to(folder)
    (folder / "back").symlink_to(stage_dir)
    (run / "keys").symlink_to(stage_dir)
    (run / "again").symlink_to(run / "keys" / "done")  # no stage
    (found,) = directories_in(run)
    assert (found.name, found.kind) == ("keys", "stage")
    assert found.names() == [name for name in expected if "/back/" not in name]
    assert len(list(found.units())) == 5


@pytest.mark.parametrize("is_complete", [False, True])
def test_lists_that_stay_no_longer_than_targets_are_written_are_not_mirrored(
    is_complete: bool, tmp_path: Path
) -> None:
    """Those of a run's own, which are there to stay, are."""
    for name in ("targets", "targets/lists", "lists"):
        (tmp_path / name).mkdir()
        identity = {"format": f"mlpmem-{Path(name).name}"}
        publish_json(tmp_path / name / "identity.json", identity, seal=True)
        (tmp_path / name / "run.npy").touch()
    if is_complete:
        publish_json(tmp_path / "targets" / "manifest.json", {"format": "mlpmem-targets"}, seal=True)
    found = {directory.name: directory.names() for directory in directories_in(tmp_path)}
    last = ["manifest.json"] if is_complete else []
    assert found == {"lists": ["identity.json", "run.npy"], "targets": ["identity.json", "run.npy", *last]}
    assert [directory.name for directory in directories_in(tmp_path / "targets")] == [""]
