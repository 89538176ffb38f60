"""What write_targets refuses: flags, inputs, damage, small disks and directories of other runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.stages.targets import write_targets

from .conftest import COMPACT, NUM_KEYS, config, result_of, values, vectors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 0}, "--k must be at least 1 and at most 65535, not 0"),
        ({"k": 70_000}, "--k must be .* not 70000"),
        ({"temperature": "auto", "k": 1}, "--k 1: .* give --temperature 1"),
        (
            {"temperature": "auto", "neighbour_perplexity": -1.0},
            "--neighbour-perplexity must be above 1, not -1",
        ),
        ({"temperature": "hot"}, "--temperature must be .* not hot"),
        ({"temperature": "-1"}, "--temperature must be .* not -1"),
        ({"temperature": "nan"}, "--temperature must be .* not nan"),
        ({"mass": 0.0}, "--mass must be above 0 and at most 1, not 0"),
        ({"mass": 1.5}, "--mass must be .* not 1.5"),
        ({"temperature": "auto", "neighbour_perplexity": 20.0}, "--neighbour-perplexity 20 .* half of --k"),
        ({"temperature": "2", "neighbour_perplexity": 4.0}, "4 is what --temperature auto aims at, .* leave"),
        ({"threads": 100_000}, "--threads must be at least 1 and at most 1024, not 100000"),
        ({"nprobe": 0}, "--nprobe must be at least 1, not 0"),
        ({"shard_positions": 0}, "--shard-positions must be at least 1, not 0"),
        ({"exclude_window": -1}, "--exclude-window must be at least 0, not -1"),
        ({"exclude": "same-document"}, "give --corpus"),
        ({"audit": -1}, "--audit must be at least 1, not -1"),
        ({"raw_keys": Path("raw")}, "--raw-keys is of --audit: add that, or leave it out"),
    ],
)
def test_bad_flags(keys: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(keys, tmp_path / "targets", **changes)


def test_bad_inputs_leave_nothing(
    keys: Path, index: Path, keys_dir: Path, corpus_dir: Path, make_keys: Callable[..., Path], tmp_path: Path
) -> None:
    few = make_keys(tmp_path / "few", vectors()[:10], values()[:10])
    same = make_keys(tmp_path / "same", np.ones_like(vectors()), values())
    raw = make_keys(tmp_path / "raw", vectors()[:10].astype(np.float16), values()[:10])
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "none", {}, "does not exist"),
        (keys, {"search": "ivf"}, "needs --index"),
        (keys_dir, {"search": "ivf", "index": index, "shard_positions": 1024}, "built over other keys"),
        (keys, {"search": "ivf", "index": keys}, "not mlpmem-index"),
        (keys, {"exclude": "same-document", "corpus": corpus_dir}, "not the one that --keys"),
        (keys, {"exclude": "same-document", "corpus": tmp_path / "none"}, "does not exist"),
        (keys, {"shard_positions": 100}, "block size 8: choose 96"),
        (few, {"temperature": "auto", "neighbour_perplexity": 15.0}, "with 9 other keys"),
        (
            same,
            {"temperature": "auto", "neighbour_perplexity": 12.0},
            "cannot be reached: the nearest neighbours alone give",
        ),
        (keys, {"audit": 10, "raw_keys": tmp_path / "none"}, "--raw-keys .* does not exist"),
        (keys, {"audit": 10, "raw_keys": keys}, "holds codec int8: extract them with --codec raw"),
        (keys, {"audit": 10, "raw_keys": raw}, "extracted otherwise .*num_positions"),
    ]
    for keys_path, changes, words in cases:
        with pytest.raises(UserError, match=words):
            write_targets.run(config(keys_path, tmp_path / "targets", **changes), World())
        assert not (tmp_path / "targets").exists()


@pytest.mark.parametrize("damaged", ["keys", "index"])
def test_a_flipped_byte_of_what_is_searched_is_refused(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path, damaged: str
) -> None:
    for name, root in (("keys", keys), ("index", index)):
        shutil.copytree(root, tmp_path / name)
    path = sorted((tmp_path / damaged).glob("keys-*.npy" if damaged == "keys" else "shard-*"))[-1]
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    paths = {"keys_dir": tmp_path / "keys", "index": tmp_path / "index", "output_dir": tmp_path / "targets"}
    settings = config(**paths, search="ivf", nprobe=3)
    with pytest.raises(
        DamagedDataError, match=f"{path.name} does not have the checksum.*run the stage that made"
    ):
        write_targets.run(settings, World())
    assert not list((settings.output / "done").glob("*.json")) and not list(settings.output.glob("knn-*"))
    path.write_bytes(good)
    write_targets.run(settings, World())
    assert result_of(settings.output) == result_of(undisturbed)


def test_an_unreachable_perplexity_leaves_the_lists_and_other_flags_may_follow(
    keys: Path, index: Path, compact: Path, tmp_path: Path
) -> None:
    changes = {**COMPACT, "neighbour_perplexity": 19.99, "index": index, "exclude_window": 190}
    for rank in range(2):
        with pytest.raises(UserError, match="cannot be reached"):
            write_targets.run(config(keys, tmp_path / "targets", **changes), World(rank=rank, size=2))
        assert {path.name for path in (tmp_path / "targets").iterdir()} == {"lists"}
    write_targets.run(config(keys, tmp_path / "targets", **COMPACT, index=index), World())
    assert result_of(tmp_path / "targets") == result_of(compact)


def test_a_disk_that_is_too_small_is_refused(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="the targets need .* free some space"),
    ):
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        write_targets.run(config(keys, tmp_path / "targets"), World())
    assert not (tmp_path / "targets").exists()
    with caplog.at_level("INFO", logger="mlpmem_ds"):
        write_targets.run(config(keys, tmp_path / "targets"), World())
    said = next(record.getMessage() for record in caplog.records if "bytes a position" in record.getMessage())
    estimate = float(said.split("about ")[1].split(" bytes")[0])
    shards = open_targets(tmp_path / "targets").manifest.shards
    stored = sum((tmp_path / "targets" / shard.name).stat().st_size for shard in shards)
    assert "(exact, tar.zst)" in said and abs(estimate / (stored / NUM_KEYS) - 1) < 0.05


def test_another_run_is_not_overwritten(keys: Path, undisturbed: Path) -> None:
    before = result_of(undisturbed)
    with pytest.raises(UserError, match="already holds another run"):
        write_targets.run(config(keys, undisturbed, k=21), World())
    with pytest.raises(UserError, match="another run .*--search was 'ivf', now 'exact'.*inputs.index was"):
        write_targets.run(config(keys, undisturbed), World())
    assert result_of(undisturbed) == before


def test_unused_flags_do_not_change_the_identity(keys: Path, index: Path, tmp_path: Path) -> None:
    write_targets.run(config(keys, tmp_path / "targets", temperature="6"), World())
    before = result_of(tmp_path / "targets")
    changes = {
        "temperature": "6.0",
        "nprobe": 5,
        "index": index,
        "search": "auto",
        "batch_positions": 8,
    }
    write_targets.run(config(keys, tmp_path / "targets", **changes), World())
    assert result_of(tmp_path / "targets") == before
    identity = json.loads(before["identity.json"])["config"]
    assert (
        identity["search"] == "exact" and "neighbour_perplexity" not in identity
    )  # a fixed temperature decides
    with pytest.raises(UserError, match="--neighbour-perplexity 7 is what --temperature auto aims at"):
        config(keys, tmp_path / "targets", **changes, neighbour_perplexity=7.0)
    fitted = {"temperature": "auto", "neighbour_perplexity": 7.0}
    write_targets.run(config(keys, tmp_path / "fitted", **fitted), World())
    with pytest.raises(UserError, match="another run"):
        write_targets.run(
            config(keys, tmp_path / "fitted", **{**fitted, "neighbour_perplexity": 8.0}), World()
        )
