"""Files of models that this package wrote are compared with their records; those of others are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_json, record_file
from mlpmem_ds.formats.model_directory import (
    EXPORT_FILE,
    absence_of,
    check_model_files,
    fault_of,
    recorded_files,
)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """make_model(seal, folder="") writes two files, recorded in the file `seal` of the directory above."""

    def make(seal: str, folder: str = "") -> Path:
        root = tmp_path / "model"
        (root / folder).mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "README.md"):
            (root / folder / name).write_text(f"the content of {name}")
        names = [f"{folder}/{path.name}".lstrip("/") for path in (root / folder).iterdir()]
        records = [record_file(root, name).to_json() for name in names]
        kind = "export" if seal == EXPORT_FILE else "base"
        publish_json(root / seal, {"format": f"mlpmem-{kind}", "version": 1, "files": records}, seal=True)
        return root / folder

    return make


def test_a_name_that_nothing_has_is_said_to_be_none_first_and_the_network_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"  # with no neighbours, for `../bse`
    (here / "run" / "base").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert absence_of("run/base") is None and absence_of(here) is None
    near = "there is no such directory (did you mean run/base?), and the Hub gave no model of that name"
    assert str(absence_of("run/bse", error=OSError("refused"))).startswith(
        f"{near} (refused): check the path; of a"
    )
    assert absence_of("run/bse", error=KeyError("of a model that the Hub gave")) is None
    assert fault_of("run/bse", ValueError("of what the Hub gave")) == "of what the Hub gave"
    local = "there is no such directory, and it is no name of a tokenizer on the Hub: check the path"
    for name in ("/nowhere/at/all", "./bse", "../bse", "a/b/c", "~/no such place"):
        assert absence_of(name, what="tokenizer") == local
    (here / "run" / ".export.former").mkdir()
    killed = "no such directory, but run/.export.former: a command was killed while it replaced it"
    assert killed in str(absence_of("run/export", error=OSError("refused")))


@pytest.mark.parametrize(
    ("seal", "folder", "remedy"),
    [
        (EXPORT_FILE, "", "run tools/convert_checkpoint.py again"),
        ("manifest.json", "", "run the command that made it again"),
        ("manifest.json", "weights", "run the command that made it again"),
        ("manifest.json", "tokenizer", "run the command that made it again"),
    ],
)
def test_a_flipped_bit_is_named_with_the_remedy(
    make_model: Callable[..., Path], seal: str, folder: str, remedy: str
) -> None:
    root = make_model(seal, folder)
    check_model_files(root, flag="--model")
    flip(root / "model.safetensors")
    check_model_files(root, flag="--model", names=["config.json"])
    said = rf"--model: .*model\.safetensors does not have the checksum of its record: {remedy}"
    with pytest.raises(DamagedDataError, match=said):
        check_model_files(root, flag="--model")


def test_a_damaged_list_is_refused_too(make_model: Callable[..., Path]) -> None:
    root = make_model(EXPORT_FILE)
    (root / EXPORT_FILE).write_text((root / EXPORT_FILE).read_text().replace("safetensors", "safetensorz"))
    with pytest.raises(DamagedDataError, match="does not have the checksum that it carries"):
        check_model_files(root, flag="--model")


def test_the_card_is_for_people_and_other_directories_are_not_ours(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_model(EXPORT_FILE)
    flip(root / "README.md")
    check_model_files(root, flag="--model")
    assert "README.md" not in recorded_files(root)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"files": 3}')
    assert recorded_files(tmp_path / "other") == {}
    check_model_files("owner/name", flag="--model")
