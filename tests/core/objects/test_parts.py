"""Files to a store: hashed on the way, in parts to S3, where finished parts are not sent again."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord, record_file
from mlpmem_ds.core.objects import parts
from mlpmem_ds.core.objects.parts import in_order, part_bytes_of, send_file
from mlpmem_ds.core.objects.store import Store

_MIB = 1 << 20


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """12 MiB, in parts of 5 (the least that S3 takes)."""
    monkeypatch.setattr(parts, "PART_BYTES", 5 * _MIB)
    path = tmp_path / "large.bin"
    path.write_bytes(np.random.default_rng(0).bytes(12 * _MIB))
    return path


def test_results_keep_the_order_of_their_items() -> None:
    with ThreadPoolExecutor(3) as pool:
        assert list(in_order(pool, lambda item: item * item, range(20), ahead=5)) == [
            item * item for item in range(20)
        ]


def test_an_object_of_any_size_has_parts_that_s3_takes() -> None:
    assert part_bytes_of(1) == parts.PART_BYTES
    largest = 5 * 10**12
    assert largest / part_bytes_of(largest) < 10_000 and part_bytes_of(largest) % _MIB == 0


def test_a_file_is_sent_and_its_record_returned(url: str, large: Path) -> None:
    store = Store(url)
    record = send_file(store, "a/large", large, None)
    content = large.read_bytes()
    assert record == FileRecord(
        name="a/large", bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    assert store.read("a/large") == content


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_file_that_is_not_what_its_record_says_is_not_sent(url: str, large: Path, size: str) -> None:
    if size == "small":
        large.write_bytes(b"small")
    elif url.startswith("gs:"):
        pytest.skip("the emulator of Google's store cannot cancel an upload, and is asked for half a minute")
    record = record_file(large.parent, large.name)
    with open(large, "r+b") as stream:
        stream.write(b"X")
    store = Store(url)
    with pytest.raises(DamagedDataError, match=r"large.bin does not have the checksum"):
        send_file(store, "large.bin", large, record)
    with open(large, "ab") as stream:
        stream.write(b"X")
    with pytest.raises(DamagedDataError, match=r"large.bin has \d+ bytes where"):
        send_file(store, "large.bin", large, record)
    assert store.sizes() == {}


class PartStore(Store):
    """Keeps the numbers of the parts that are sent; the connection breaks at part `breaks_at`."""

    def __init__(self, url: str, *, breaks_at: int = 0) -> None:
        super().__init__(url)
        self.breaks_at = breaks_at
        self.sent: list[int] = []

    def s3(self, method: str, name: str, **arguments: Any) -> dict[str, Any]:
        if method == "upload_part":
            if arguments["PartNumber"] == self.breaks_at:
                raise KeyboardInterrupt
            self.sent.append(arguments["PartNumber"])
        return super().s3(method, name, **arguments)


def test_finished_parts_are_not_sent_again(s3_url: str, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PARTS_AHEAD", 0)
    with pytest.raises(KeyboardInterrupt):
        send_file(PartStore(s3_url, breaks_at=2), "large", large, None)
    store = PartStore(s3_url)
    assert store.sizes() == {}
    send_file(store, "large", large, None)
    assert sorted(store.sent) == [2, 3]
    assert store.read("large") == large.read_bytes()


def test_a_part_that_has_changed_is_sent_again(
    s3_url: str, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_PARTS_AHEAD", 0)
    with pytest.raises(KeyboardInterrupt):
        send_file(PartStore(s3_url, breaks_at=3), "large", large, None)
    with open(large, "r+b") as stream:
        stream.write(b"changed")
    store = PartStore(s3_url)
    send_file(store, "large", large, None)
    assert sorted(store.sent) == [1, 3] and store.read("large") == large.read_bytes()


def test_two_writers_of_one_upload_both_end_well(s3_url: str, large: Path) -> None:
    """The second finds the parts of the first, which completes the upload meanwhile."""

    class Overtaken(Store):
        def s3(self, method: str, name: str, **arguments: Any) -> dict[str, Any]:
            if method == "complete_multipart_upload":
                super().s3(method, name, **arguments)
            return super().s3(method, name, **arguments)

    record = send_file(Overtaken(s3_url), "large", large, None)
    assert Store(s3_url).read("large") == large.read_bytes() and record.bytes == 12 * _MIB


def test_an_upload_that_is_gone_is_not_taken_for_one_that_another_writer_ended(
    s3_url: str, large: Path
) -> None:
    """As where the bucket's lifecycle rule removes it."""

    class Aborted(Store):
        def s3(self, method: str, name: str, **arguments: Any) -> dict[str, Any]:
            if method == "complete_multipart_upload":
                super().s3("abort_multipart_upload", name, UploadId=arguments["UploadId"])
                raise UserError(f"{self.url}/{name}: no such upload") from FileNotFoundError(name)
            return super().s3(method, name, **arguments)

    with pytest.raises(UserError, match=f"{s3_url}/large: no such upload"):
        send_file(Aborted(s3_url), "large", large, None)
    assert Store(s3_url).read("large") is None
