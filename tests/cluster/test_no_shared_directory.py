"""Hosts that share no directory: each stage runs on one of them, and passes on through an object store."""

import importlib.util
import subprocess
import time

import pytest

from ..conftest import write_text
from ..object_store import BUCKET, KEYS
from . import pipeline
from .hosts import REPOSITORY
from .launchers import complete
from .warm import on_one_host, warm

pytestmark = pytest.mark.cluster
URL = f"s3://{BUCKET}/run"
PORT = 5000
SECONDS_TO_START = 60.0
MAKE_BUCKET = f"import s3fs; s3fs.S3FileSystem().mkdir({BUCKET!r})"
MISSING = [name for name in ("moto", "s3fs") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason="no S3 server: pip install 'moto[server]' s3fs")
def test_two_hosts_without_a_shared_directory_give_the_same_through_a_store(new_cluster, undisturbed):
    cluster = new_cluster(3, shared=False)
    environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://{cluster.hosts[2].name}:{PORT}"}
    for host in cluster.hosts:
        host.environment.update(environment)
    start_store(cluster.hosts[2])
    workers = warm(cluster.hosts[:2])
    for worker in workers:
        write_text(worker.host.disk / "text", num_files=48)
        pipeline.write_config(worker.host.disk)
    for number, stage in enumerate(pipeline.stages()):
        worker, ranks = workers[number % 2], 1 if stage.name in pipeline.ALONE else 2
        complete(on_one_host(worker, from_the_store(stage), ranks), cluster.directory)
        complete(on_one_host(worker, mirror(stage.name, f"{URL}/{stage.name}")), cluster.directory)
        assert pipeline.differences(worker.host.disk, undisturbed, stage.name) == []
        assert not (workers[1 - number % 2].host.disk / stage.name).exists()
    complete(on_one_host(workers[0], mirror(URL, "fetched")), cluster.directory)
    for stage in pipeline.stages():
        assert pipeline.differences(workers[0].host.disk / "fetched", undisturbed, stage.name) == []


def from_the_store(stage):
    """The command's words, with each input that an earlier stage wrote read from its mirror."""
    names = [one.name for one in pipeline.stages()]
    before = names[: names.index(stage.name)]
    words = stage.words
    return [
        f"{URL}/{word}" if word in before and words[number - 1] != "--head" else word
        for number, word in enumerate(words)
    ]


def mirror(*words):
    return [str(REPOSITORY / "tools" / "mirror.py"), *words]


def start_store(host):
    host.start(
        ["python", "-m", "moto.server", "-H", "0.0.0.0", "-p", str(PORT)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + SECONDS_TO_START
    while host.run(["python", "-c", MAKE_BUCKET])[0] != 0:
        assert time.monotonic() < deadline, "no store"
        time.sleep(0.5)
