"""What a command may name as the one file that it writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.output_files import check_output_file


def check(path: Path, *inputs: Path) -> None:
    check_output_file(path, example="plan.json", flag="--to", inputs=inputs)


def test_a_new_file_and_an_earlier_one_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("plan.json"), tmp_path / "plan.json"):
        check(path)
    Path("plan.json").write_text("{}")
    check(Path("plan.json"), tmp_path / "missing", tmp_path)
    assert Path("plan.json").read_text() == "{}"


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--to .* is a directory: name a file, such as .*/plan.json"):
        check(tmp_path)
    with pytest.raises(UserError, match="no-such-folder does not exist; make it first"):
        check(tmp_path / "no-such-folder" / "plan.json")
    with pytest.raises(UserError, match="/dev/null is a device or a pipe: name a file, such as plan.json"):
        check(Path("/dev/null"))  # a file that is published would take its place
    monkeypatch.setattr(os, "access", lambda folder, mode: False)  # tests may run as root
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written to; choose another"):
        check(tmp_path / "plan.json")


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    prompts, link = tmp_path / "prompts.txt", tmp_path / "link"
    prompts.write_text("Once")
    link.symlink_to(prompts)
    for path in (prompts, link):
        with pytest.raises(UserError, match="is also what is read, and would be replaced: name another"):
            check(path, tmp_path / "other", prompts)


def test_a_file_of_a_stage_is_not_replaced(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "keys"
    (stage / "done").mkdir(parents=True)
    publish_json(stage / "manifest.json", {"format": "mlpmem-keys"}, seal=True)
    for name in ("manifest.json", "done/unit.json"):
        (stage / name).touch()
        with pytest.raises(UserError, match=f"is a file of {stage}, which a command .* outside of it"):
            check(stage / name)
    check(stage / "new.json")  # nothing is lost
    (stage / "page.html").touch()
    check(stage / "page.html")  # no stage has one
    (tmp_path / "manifest.json").write_text('{"format": "of another program"}')
    check(tmp_path / "manifest.json")
