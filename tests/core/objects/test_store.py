"""The objects below a URL, on every kind of store that can be opened here, and errors in words."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from fsspec.registry import _registry

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.objects.store import Store


def test_objects_are_written_read_listed_and_removed(url: str) -> None:
    store = Store(url)
    assert store.sizes() == {} and store.read("a/b") is None and store.read_range("a/b", 0, 2) is None
    store.write("a/b", b"0123456789")
    store.write("c", b"")
    assert store.sizes() == {"a/b": 10, "c": 0} and store.sizes("a") == {"a/b": 10}
    assert store.read("a/b") == b"0123456789" and store.read_range("a/b", 3, 5) == b"34"
    store.write("a/b", b"new")
    assert store.read("a/b") == b"new"
    store.remove("a/b")
    store.remove("a/b")
    assert store.sizes() == {"c": 0}


def test_what_is_there_is_not_written_over(url: str) -> None:
    store = Store(url)
    assert store.write_if_absent("begun", b"one") == b"one"
    assert store.write_if_absent("begun", b"two") == b"one"


def test_of_two_writers_at_the_same_moment_one_wins(url: str) -> None:
    if url.startswith("gs:"):
        pytest.skip("the emulator of Google's store knows no uploads on a condition")

    class Late(Store):
        has_looked = False

        def read(self, name: str) -> bytes | None:
            if not self.has_looked:  # right before the other one writes
                self.has_looked = True
                return None
            return super().read(name)

    Store(url).write("begun", b"one")
    assert Late(url).write_if_absent("begun", b"two") == b"one"
    assert Store(url).sizes() == {"begun": 3}


def test_without_links_a_file_gets_its_name_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = Store(f"file://{tmp_path}/store")
    assert store.write_if_absent("begun", b"one") == b"one" == store.read("begun")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["begun"]


def test_a_stream_that_fails_leaves_no_object(memory_url: str) -> None:
    store = Store(memory_url)
    with pytest.raises(UserError, match="full"), store.writing("a", 4, 4) as stream:
        stream.write(b"half")
        raise OSError("full")
    assert store.sizes() == {}
    with store.writing("a", 4, 4) as stream:
        stream.write(b"full")
    assert store.read("a") == b"full"


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(UserError, match="ftps3://x/y is of no kind that fsspec knows"):
        Store("ftps3://x/y")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for scheme in ("gs", "gcs"):
        _registry.pop(scheme, None)  # if it was opened before
    with pytest.raises(UserError, match="gs://bucket/run needs the package gcsfs: pip install gcsfs"):
        Store("gs://bucket/run")


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_missing_bucket_is_named(kind: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(f"{kind}_url")
    store = Store(f"{kind}://no-such-bucket/run")
    assert store.read("a") is None and store.sizes() == {}
    with pytest.raises(UserError, match=rf"cannot write {kind}://no-such-bucket/run/a .*make the bucket"):
        store.write("a", b"")


def test_a_store_out_of_reach_is_named(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"cannot read s3://bucket/run/a .*AWS_ENDPOINT_URL"):
        Store("s3://bucket/run").read("a")


def test_missing_credentials_are_named(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot write .*set the store's credentials"):
        Store("s3://bucket/run").write("a", b"")


class HttpError(Exception):
    """As gcsfs raises it."""


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (HttpError("Anonymous caller does not have storage.objects.get access, 401"), "GOOGLE_APPLICATION"),
        (HttpError("Invalid Credentials, 401"), "GOOGLE_APPLICATION_CREDENTIALS"),
        (OSError("Forbidden: https://storage.googleapis.com/b/o\nno access"), "may read and write there"),
        (HttpError("Service Unavailable, 503"), "check the URL and the store"),  # no key would help
        (type("ProxyError", (OSError,), {})(), "check the network"),
    ],
)
def test_what_googles_store_refuses_has_its_remedy(
    memory_url: str, monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    store = Store(memory_url)

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(store._fs, "cat_file", refuse)
    with pytest.raises(UserError, match=remedy) as found:
        store.read("a")
    assert "\n" not in str(found.value) and type(error).__name__ in str(found.value)
