"""`train --loader webdataset`, whole: stopped and continued, also by other ranks; what it refuses."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.shard_deal import ShardDeal
from mlpmem_ds.stages.training import train

from .conftest import BLOCK, write_targets

FLAGS = {
    "loader": "webdataset",
    "open_shards": 1,
    "shuffle_buffer_positions": 128,
    "epochs": 1.5,
    "batch_positions": 48,
    "hidden_size": 16,
    "num_blocks": 1,
    "save_every_steps": 4,
    "keep_checkpoints": 9,
    "log_every_steps": 1,
    "micro_batch_positions": 12,
    "learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def streamed(inputs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of one block a shard; those under `here` have their manifest alone."""
    root = tmp_path_factory.mktemp("streamed-targets")
    keys = open_keys(inputs_dir / "keys")
    write_targets(root / "targets", keys, cuts=range(1, -(-keys.num_positions // BLOCK)))
    (root / "here").mkdir()
    for name in ("manifest.json", "identity.json"):
        shutil.copy(root / "targets" / name, root / "here" / name)
    return root


@pytest.fixture(scope="module")
def runs(make_runs: Any, inputs_dir: Path, streamed: Path) -> Any:
    return make_runs(
        {
            **FLAGS,
            "corpus": inputs_dir / "corpus",
            "keys": inputs_dir / "keys",
            "targets": streamed / "targets",
        }
    )


@pytest.fixture(scope="module")
def store(streamed: Path) -> Iterator[str]:
    """The shards on an HTTP server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    handler = functools.partial(Quiet, directory=str(streamed / "targets"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


def test_a_streamed_training_learns_stops_and_goes_on(runs: Any, streamed: Path, store: str) -> None:
    """From a path, from an HTTP server with nothing but the manifest at hand, and by two ranks."""
    elsewhere = {"targets": streamed / "here", "targets_url": store}
    runs.succeed(
        runs.start("path", 2),
        runs.start("http", 2, **elsewhere),
        runs.start("stopped", 2, stop_after_seconds=1e-3),
        runs.start("stopped", 2, size=2, stop_after_seconds=1e-3),
        runs.start("stopped", 2, **elsewhere),
        runs.start("two", 3, size=2),
    )
    losses = runs.losses("path")
    assert losses[-3:].mean() < losses[:3].mean()
    np.testing.assert_array_equal(runs.losses("http"), losses)
    runs.assert_same_weights("http", "path")
    for name in ("stopped", "two"):
        found = runs.losses(name)
        assert len(found) == len(losses) and found[-3:].mean() < found[:3].mean()
    num_shards = len(list((streamed / "targets").glob("knn-*.tar.zst")))
    for name, step in (("path", 4), ("stopped", 3), ("stopped", 6), ("two", 4)):
        manifest = read_json(runs / name / "checkpoints" / f"step-{step:08d}" / "manifest.json")
        deal = ShardDeal.from_json(manifest["values"]["reader"])
        assert 0 < deal.horizon <= 2 * num_shards and len(deal.left) < deal.horizon
        trained = deal.horizon - len(deal.left) + sum(shard.mask > 0 for shard in deal.left)
        assert 48 * step / BLOCK - 2 <= trained <= 48 * step / BLOCK + 2, (name, step, deal)


def test_what_cannot_be_streamed_is_refused(runs: Any, streamed: Path) -> None:
    runs.refuse("are too few for 1 ranks with --open-shards 99", "wrong", 2, open_shards=99)
    with pytest.raises(UserError, match="streams the shards of --targets"):
        train.Config(
            ds_config=streamed,
            corpus=streamed,
            output=streamed / "wrong",
            keys=streamed,
            alpha=0.0,
            loader="webdataset",
        )
    runs.refuse("--order is of --loader stored: add that", "wrong", 2, order="positions")
    runs.refuse(
        "--targets-url, --open-shards, --shuffle-buffer-positions are of --loader webdataset: add that",
        "wrong",
        2,
        loader="stored",
        targets_url="http://nowhere",
    )
    (code,), (said,) = runs.run(
        runs.start("nowhere", 2, targets=streamed / "here", targets_url=f"pipe:cat {streamed}/none/{{}}")
    )
    assert code != [0] and "could not be streamed" in said
