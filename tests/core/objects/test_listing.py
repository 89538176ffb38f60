"""What a mirror says of itself: sealed, the last object, another directory refused."""

from __future__ import annotations

import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord
from mlpmem_ds.core.objects import listing
from mlpmem_ds.core.objects.listing import BEGUN, FILES, begin, publish_listing, read_listing, require_listing
from mlpmem_ds.core.objects.store import Store

RECORDS = [FileRecord(name=f"file-{number}", bytes=number, sha256=f"{number:064}") for number in range(5)]


def test_a_listing_is_read_as_it_was_written(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_FILES_OF_LIST", 2)
    store = Store(memory_url)
    begin(store, "of", name="here")
    assert read_listing(store) is None
    publish_listing(store, "of", RECORDS[::-1])
    found = require_listing(store, flag="--keys")
    assert found.files == tuple(RECORDS) and found.of == "of" and found.num_bytes == 10
    assert found.find("file-3") == RECORDS[3] and found.find("file-9") is None
    assert len(store.sizes()) == 5  # begun, three lists, files


def test_a_url_without_a_whole_mirror_is_refused_with_the_reason(memory_url: str) -> None:
    store = Store(memory_url)
    with pytest.raises(UserError, match=f"--keys {memory_url} holds no mirror"):
        require_listing(store, flag="--keys")
    begin(store, "of", name="here")
    with pytest.raises(UserError, match="its push has not ended"):
        require_listing(store, flag="--keys")


def test_the_mirror_of_another_directory_is_refused(memory_url: str) -> None:
    store = Store(memory_url)
    begin(store, "one", name="here")
    begin(store, "one", name="here")
    with pytest.raises(UserError, match="is the mirror of another directory than here .*--replace"):
        begin(store, "two", name="here")


@pytest.mark.parametrize("name", [BEGUN, FILES, ".mirror/000000.json"])
def test_a_damaged_listing_is_refused_with_its_name(memory_url: str, name: str) -> None:
    store = Store(memory_url)
    begin(store, "of", name="here")
    publish_listing(store, "of", RECORDS)
    content = store.read(name)
    assert content is not None
    for damaged in (content.replace(b'"of": "of"', b'"of": "on"').replace(b"file-3", b"file-4"), b"[", b"{}"):
        store.write(name, damaged)
        with pytest.raises(DamagedDataError, match=name.replace(".", r"\.") + ".*--replace"):
            begin(store, "of", name="here")
            read_listing(store)
