import json
import os
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import (
    SEAL,
    FileRecord,
    canonical_json,
    fault_of_file,
    publish,
    publish_array,
    publish_bytes,
    publish_json,
    read_json,
    read_sealed_json,
    record_file,
    require_free_bytes,
    sha256_of_file,
    size_in_words,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    publish_bytes(target, b"old")
    with pytest.raises(RuntimeError), publish(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_faults_are_named(tmp_path: Path) -> None:
    publish_array(tmp_path / "a.npy", np.arange(5))
    record = record_file(tmp_path, "a.npy")
    assert fault_of_file(tmp_path, record) is None
    content = bytearray((tmp_path / "a.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a.npy").write_bytes(content)
    assert "checksum" in (fault_of_file(tmp_path, record) or "")
    assert fault_of_file(tmp_path, record, checksum=False) is None
    (tmp_path / "a.npy").write_bytes(content[:-1])
    assert "bytes" in (fault_of_file(tmp_path, record, checksum=False) or "")
    (tmp_path / "a.npy").unlink()
    assert "missing" in (fault_of_file(tmp_path, record) or "")


def test_json_has_one_spelling() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == canonical_json(dict([("a", [1.5, "é"]), ("b", 1)]))
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_every_flipped_bit_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    value = {"name": "é", "count": 120, "by_rank": {10: 0.125, 9: (1, None)}, "corpus_sha256": "0" * 64}
    plain = {**value, "by_rank": {"10": 0.125, "9": [1, None]}}
    path = tmp_path / "manifest.json"
    publish_json(path, value, seal=True)
    assert read_sealed_json(path) == read_json(path) == plain and SEAL in json.loads(path.read_bytes())
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in {0, place % 8}:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(DamagedDataError, match=r"manifest\.json"):
                read_sealed_json(path)
    for stop in range(len(content) - 1):
        path.write_bytes(content[:stop])
        with pytest.raises(DamagedDataError):
            read_sealed_json(path)


def test_a_seal_is_asked_for_where_it_belongs(tmp_path: Path) -> None:
    publish_json(tmp_path / "x.json", {"a": "0" * 64})
    assert read_json(tmp_path / "x.json") == {"a": "0" * 64}
    with pytest.raises(DamagedDataError, match=r"x\.json is damaged.*run the stage"):
        read_sealed_json(tmp_path / "x.json")
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(DamagedDataError, match="not a JSON object"):
        read_sealed_json(tmp_path / "y.json")


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DamagedDataError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
    with pytest.raises(DamagedDataError, match="missing"):
        read_json(tmp_path / "y.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"1" * 5000, "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"a": NaN, "content_sha256": "0"}', "does not have the checksum"),
        (b'{"a": 1e999, "content_sha256": ""}', "does not have the checksum"),
        (b'{"a": "\\ud800", "content_sha256": ""}', "does not have the checksum"),
    ],
)
def test_any_damage_of_json_is_damage(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DamagedDataError, match=f"x\\.json .*{said}"):
        read_sealed_json(tmp_path / "x.json")


def test_what_is_no_file_of_ours_is_not_parsed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DamagedDataError, match="not valid JSON"):
        read_json(tmp_path / "pipe.json")
    with open(tmp_path / "huge.json", "wb") as stream:
        stream.truncate(1 << 27)
    with pytest.raises(DamagedDataError, match="134,217,728 bytes, and no file of its kind"):
        read_json(tmp_path / "huge.json")
    (tmp_path / "file").touch()
    with pytest.raises(DamagedDataError, match="missing"):
        read_json(tmp_path / "file" / "x.json")


def test_a_disk_that_fills_up_is_named_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, publish(tmp_path / "keys.npy") as temporary:
        temporary.touch()
        with open("/dev/full", "wb", buffering=0) as stream:
            stream.write(b"x")
    assert caught.value.filename == str(tmp_path / "keys.npy")


def test_a_file_with_a_bad_sector_is_a_damaged_file(tmp_path: Path) -> None:
    """So that its unit is made again; before, the file had to be removed by hand."""
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("this system has no file that is there and cannot be read")
    bad = tmp_path / "bad.json"
    bad.symlink_to("/proc/self/mem")  # nothing is mapped at its start
    record = FileRecord(name=bad.name, bytes=0, sha256="0" * 64)
    assert fault_of_file(tmp_path, record) == f"{bad} cannot be read (Input/output error)"
    assert fault_of_file(tmp_path, record, checksum=False) is None
    with pytest.raises(DamagedDataError, match="bad.json cannot be read .Input/output error.; run the stage"):
        read_sealed_json(bad)
    with pytest.raises(OSError, match=str(bad)):  # it says no name of itself
        sha256_of_file(bad)


def test_a_full_disk_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="free some space"):
        require_free_bytes(tmp_path / "not" / "yet", 1 << 60, what="the keys")
    require_free_bytes(tmp_path, 1, what="the keys")


@pytest.mark.parametrize("value", ["\\ud800", "NaN", "[" * 9])
def test_a_sealed_file_with_what_none_of_ours_holds_is_damaged(value: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    spelled = value if value == "NaN" else f'"{value}"'
    path.write_text(f'{{"a": {spelled}, "{SEAL}": "00"}}')
    with pytest.raises(DamagedDataError, match="does not have the checksum"):
        read_sealed_json(path)


@pytest.mark.parametrize("name", ["", "/a", "..", "../a", "a/../../b", "a//b", "./a", "a/", "a\0b"])
def test_a_record_of_a_file_elsewhere_is_refused(name: str) -> None:
    """A bucket's list may be written by anyone; what it names is written, replaced and removed."""
    with pytest.raises(ValueError, match="names no file below its directory"):
        FileRecord(name=name, bytes=1, sha256="0")


@pytest.mark.parametrize("name", ["a" * 300, "a\ud800b"])
def test_a_name_that_no_file_can_have_is_a_missing_file(name: str, tmp_path: Path) -> None:
    fault = fault_of_file(tmp_path, FileRecord(name=name, bytes=1, sha256="0"))
    assert fault is not None and "is missing" in fault


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 bytes"),
        (9_999, "9999 bytes"),
        (10_000, "0.01 MB"),
        (5_000_000, "5.00 MB"),
        (1_400_000_000, "1.40 GB"),
        (3 * 10**12, "3.00 TB"),
    ],
)
def test_a_size_is_said_in_the_unit_that_shows_it(num_bytes: int, words: str) -> None:
    assert size_in_words(num_bytes) == words
