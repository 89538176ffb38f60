"""Hosts for the tests of this folder, or a skip that says why there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .hosts import Cluster, make_cluster, why_not


@pytest.fixture(scope="session")
def _namespaces() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture()
def new_cluster(_namespaces: None, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """new_cluster(num_hosts=2, shared=True): hosts that last for one test."""
    with ExitStack() as stack:
        yield lambda *sizes, **options: stack.enter_context(
            make_cluster(tmp_path / "cluster", *sizes, **options)
        )
