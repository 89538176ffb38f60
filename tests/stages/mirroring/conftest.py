"""An S3 server with a bucket, and a cache of this test's own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ...object_store import BUCKET, KEYS, s3_server


@pytest.fixture(scope="module")
def s3_address() -> Iterator[str]:
    yield from s3_server()


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a run may lie; the cache is empty."""
    monkeypatch.setenv("MLPMEM_CACHE", str(tmp_path / "cache"))
    if request.param == "file":
        return f"file://{tmp_path}/store/run"
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": request.getfixturevalue("s3_address")}.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/run"
