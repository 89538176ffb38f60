"""Commands in this process, servers with a bucket of S3's and Google's kind, a cache of each test's own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mlpmem_ds import commands

from ...object_store import BUCKET, KEYS, gs_environment, gs_server, s3_server


def run(words: Sequence[object]) -> None:
    """A command of the project in this process; it must succeed."""
    name, *flags = map(str, words)
    command = Path(name).stem.replace("_", "-")
    assert commands.COMMANDS[command](flags) == 0


@pytest.fixture(scope="module")
def s3_address() -> Iterator[str]:
    yield from s3_server()


@pytest.fixture(scope="module")
def gs_address() -> Iterator[str]:
    yield from gs_server()


@pytest.fixture(params=["file", "s3", "gs"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a run may lie; the cache is empty."""
    monkeypatch.setenv("MLPMEM_CACHE", str(tmp_path / "cache"))
    if request.param == "file":
        return f"file://{tmp_path}/store/run"
    address = request.getfixturevalue(f"{request.param}_address")
    of_s3 = {**KEYS, "AWS_ENDPOINT_URL": address}
    for name, value in (of_s3 if request.param == "s3" else gs_environment(address)).items():
        monkeypatch.setenv(name, value)
    return f"{request.param}://{BUCKET}/{uuid.uuid4().hex}/run"
