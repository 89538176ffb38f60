"""Hosts for the tests of this folder, or a skip that says why there are none; an undisturbed run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from ..conftest import write_text
from . import pipeline
from .hosts import Cluster, Process, make_cluster, why_not
from .launchers import complete
from .warm import WarmHost, on_one_host, warm


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


@pytest.fixture(scope="session")
def cluster(_namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four hosts with a shared directory, for all tests; most take the first two."""
    with make_cluster(tmp_path_factory.mktemp("cluster"), 4) as made:
        yield made


@pytest.fixture(scope="session")
def warm_hosts(cluster: Cluster) -> list[WarmHost]:
    return warm(cluster.hosts[:2])


@pytest.fixture(scope="session")
def seconds_of_stage() -> dict[str, float]:
    """What each stage of `undisturbed` took."""
    return {}


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, warm_hosts: Sequence[WarmHost], seconds_of_stage: dict[str, float]) -> Path:
    """The whole pipeline on the first host alone, two ranks where a stage has ranks."""
    run = cluster.directory / "undisturbed"
    write_text(run / "text", num_files=48)
    pipeline.write_config(run)
    for stage in pipeline.stages():
        ranks, began = 1 if stage.name in pipeline.ALONE else 2, time.monotonic()
        complete(on_one_host(warm_hosts[0], stage.words, ranks), run)
        seconds_of_stage[stage.name] = time.monotonic() - began
    return run


@pytest.fixture(scope="session")
def orphans(warm_hosts: Sequence[WarmHost]) -> Callable[[], list[Process]]:
    """What runs on the hosts when no job does; a process that is about to end gets some seconds."""

    def find() -> list[Process]:
        deadline = time.monotonic() + 10
        while (
            found := [one for host in warm_hosts for one in host.others()]
        ) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    return find


@pytest.fixture()
def new_run(cluster: Cluster, undisturbed: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """new_run(stage): a run directory with all that is undisturbed before that stage, and nothing after."""

    def make(stage: str) -> Path:
        run = cluster.directory / f"{request.node.name.replace('[', '-').rstrip(']')}"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        shutil.copytree(undisturbed / "text", run / "text")
        pipeline.write_config(run)
        for earlier in pipeline.stages():
            if earlier.name == stage:
                return run
            shutil.copytree(undisturbed / earlier.name, run / earlier.name)
        raise AssertionError(stage)

    return make
