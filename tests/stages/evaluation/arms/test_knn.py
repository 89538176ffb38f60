"""Scores of the kNN arms against brute force over all keys."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core import files, verified_inputs
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.maths.knn import Neighbours
from mlpmem_ds.maths.rescoring import rescore
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation.arms import knn
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.inputs import open_inputs
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.retrieval.index_search import bytes_in_memory
from mlpmem_ds.stages.retrieval.knn_scorer import TEMPERATURE_FACTORS

from ..conftest import (
    NEIGHBOURS,
    TEMPERATURE,
    Finished,
    K,
    brute_force_knn,
    forward_base,
    read_scores,
    save_targets,
)


def test_knn_arm_equals_a_brute_force_evaluation(
    finished: Finished, base_dir: Path, keys_dir: Path, corpus_dir: Path
) -> None:
    config, _, evaluation = finished
    row = evaluation.arm("base+knn_exact")
    choices = [(k, factor * TEMPERATURE) for k in NEIGHBOURS for factor in TEMPERATURE_FACTORS]
    column = choices.index((row.chosen["neighbours"], row.chosen["temperature"]))
    for split in ("tuning", "test", "heldout"):
        corpus = open_corpus(corpus_dir, split)
        log_probabilities, states = forward_base(base_dir, corpus)
        labels = corpus.values(0, corpus.num_positions)
        p_base = np.exp(log_probabilities[np.arange(len(labels)), labels])
        p_knn = brute_force_knn(keys_dir, states, labels, row.chosen["temperature"], row.chosen["neighbours"])
        found = np.exp(read_scores(config.output, split, "base+knn_exact").astype(np.float64))[:, column]
        np.testing.assert_allclose(found, p_knn, rtol=2e-6, atol=1e-12)
        assert (p_knn == 0).any() and (p_knn > 0.01).any()
        mixture = (1 - row.lmbda) * p_base + row.lmbda * p_knn
        assert row.splits[split].ppl == pytest.approx(math.exp(-np.log(mixture).mean()), rel=1e-6)
    assert 0 < row.lmbda < 1


def test_the_choice_on_the_tuning_split_is_the_best_of_all_by_brute_force(
    finished: Finished, base_dir: Path, keys_dir: Path, corpus_dir: Path
) -> None:
    _, _, evaluation = finished
    corpus = open_corpus(corpus_dir, "tuning")
    log_probabilities, states = forward_base(base_dir, corpus)
    labels = corpus.values(0, corpus.num_positions)
    p_base = np.exp(log_probabilities[np.arange(len(labels)), labels])
    perplexities = {}
    for k in NEIGHBOURS:
        for factor in TEMPERATURE_FACTORS:
            p_knn = brute_force_knn(keys_dir, states, labels, factor * TEMPERATURE, k)
            for weight in np.arange(0, 1, 0.05):
                perplexities[round(weight, 10), factor * TEMPERATURE, k] = math.exp(
                    -np.log((1 - weight) * p_base + weight * p_knn).mean()
                )
    row = evaluation.arm("base+knn_exact")
    assert (row.lmbda, row.chosen["temperature"], row.chosen["neighbours"]) == min(
        perplexities, key=perplexities.get
    )


def test_the_first_keys_of_a_datastore_are_searched_as_a_datastore_of_their_own(finished: Finished) -> None:
    exact, indexed = open_inputs(finished.config, World()).arms[1:3]
    stored = exact.vote.keys.read("keys")
    queries = stored[900:950]
    distances = ((queries[:, None].astype(np.int64) - stored[None, :700]) ** 2).sum(-1)
    nearest = np.sort(distances, axis=1)[:, :K]
    for arm in (exact, indexed):
        found = arm.at_size(700).scorer.search.search(queries, K).unpack()
        assert found.ids_QK.max() < 700 and (found.ids_QK >= 0).all()
        if arm is exact:
            np.testing.assert_array_equal(found.distances_QK, nearest)
        assert arm.scorer.search.search(queries, K).unpack().ids_QK.max() >= 900


def test_the_arms_weigh_as_the_targets_do(finished: Finished, keys_dir: Path, tmp_path: Path) -> None:
    """Kind and temperature; `--temperature` changes the temperature alone."""
    weighting = Weighting(kind="inverse-distance", temperature=3.0)
    targets = save_targets(tmp_path / "targets", open_keys(keys_dir).sha256, weighting=weighting)
    for temperature in (None, 5.0):
        config = replace(finished.config, targets=targets, temperature=temperature, output=tmp_path / "new")
        for arm in open_inputs(config, World()).arms[1:3]:
            expected = Weighting(kind="inverse-distance", temperature=temperature or 3.0)
            assert arm.vote.weighting == arm.scorer.weighting == expected
            assert arm.settings["weighting"] == "inverse-distance"
            assert {choice.kind for _, choice in arm.scorer.choices} == {"inverse-distance"}


def test_ivfpq_scores_differ_from_exact_ones_but_follow_them(finished: Finished) -> None:
    config, _, evaluation = finished
    exact, approximate = (
        read_scores(config.output, "test", f"base+knn_{kind}") for kind in ("exact", "ivfpq")
    )
    assert exact.shape == approximate.shape
    assert not np.array_equal(exact, approximate)
    assert np.corrcoef(np.exp(exact[:, 2]), np.exp(approximate[:, 2]))[0, 1] > 0.5


@pytest.mark.parametrize("factory", ["IVF4,Flat", "IVF4_HNSW4,Flat"])
def test_all_lists_of_whole_vectors_give_the_exact_scores(
    config: Config, tmp_path: Path, keys_dir: Path, finished: Finished, factory: str
) -> None:
    build_index.run(build_index.Config(keys=keys_dir, output=tmp_path / "flat", factory=factory), World())
    evaluate.run(replace(config, index=tmp_path / "flat", control=(), memory=()), World())
    exact, all_lists = (read_scores(config.output, "test", f"base+knn_{kind}") for kind in ("exact", "ivfpq"))
    np.testing.assert_array_equal(exact, read_scores(finished.config.output, "test", "base+knn_exact"))
    # Equal distances at the k-th place may be cut differently by faiss; elsewhere every bit agrees.
    assert (exact == all_lists).mean() > 0.99
    np.testing.assert_allclose(np.exp(exact), np.exp(all_lists), atol=0.05)


def test_fewer_neighbours_are_the_nearest_ones_in_any_order_of_the_search(finished: Finished) -> None:
    scorer = open_inputs(finished.config, World()).playing("reference")[0].scorer
    keys = scorer.keys
    queries, values = keys.read("keys", 900, 950), keys.read("values", 900, 950)
    packed = scorer.search.search(queries, K)
    found = packed.rows(slice(None))
    order = np.random.default_rng(0).permuted(np.tile(np.arange(K), (50, 1)), axis=1)
    shuffled = rescore(queries, np.take_along_axis(found.ids_QK, order, axis=1), keys.read("keys"))
    np.testing.assert_array_equal(shuffled.packed_QK, packed.packed_QK)
    choices = [(count, weighting.temperature) for count, weighting in scorer.choices]
    assert choices == [
        (count, factor * TEMPERATURE) for count in NEIGHBOURS for factor in TEMPERATURE_FACTORS
    ]
    scores = scorer.log_probabilities(found, values)
    for column, (count, _) in enumerate(choices):
        few = Neighbours(ids_QK=found.ids_QK[:, :count], distances_QK=found.distances_QK[:, :count])
        np.testing.assert_array_equal(
            replace(scorer, k=count).log_probabilities(few, values)[:, column % len(TEMPERATURE_FACTORS)],
            scores[:, column],
        )
    broadest = len(TEMPERATURE_FACTORS) - 1
    assert not np.allclose(np.exp(scores[:, broadest]), np.exp(scores[:, -1]), atol=0.01)


def test_all_keys_are_searched_by_default_only_if_that_takes_little_time(
    config: Config, finished: Finished, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def exact_of(**changes: Any) -> bool:
        with caplog.at_level("INFO", logger="mlpmem_ds"):
            return open_inputs(replace(config, **changes), World()).playing("reference") != ()

    assert exact_of() and "all keys are searched too" in caplog.text
    monkeypatch.setattr(knn, "max_keys_for_exact", lambda *_: 10)
    assert not exact_of() and "without base+knn_exact; --exact searches" in caplog.text
    assert exact_of(exact=True) and not exact_of(exact=False)
    with pytest.raises(UserError, match="long work for exact search: give --index, or --exact"):
        exact_of(index=None)
    shutil.copytree(finished.config.output, config.output)
    identity = json.loads((config.output / "identity.json").read_text())
    assert identity["config"]["exact"] is True
    assert exact_of()  # a report goes on as it was begun


def test_an_index_that_no_host_holds_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of 5e9 keys is 360 GB: the system would end the rank, without a word."""
    index: Any = SimpleNamespace(num_bytes=360 * 10**9, root=Path("run/index"), factory="IVF1024,PQ64")
    keys: Any = SimpleNamespace(dim=256)
    each = index.num_bytes + 1024 * 64 * 256 * 4  # with faiss's table
    monkeypatch.setattr(knn, "free_host_bytes", lambda: index.num_bytes)
    with pytest.raises(UserError, match=r"360\.1 GB, which each rank holds in memory, and 360\.0 GB are"):
        knn._require_memory(index, keys, 1, measures_fewer=False)
    monkeypatch.setattr(knn, "free_host_bytes", lambda: each)
    for whole, num_ranks, measures_fewer, words in (
        (each, 1, True, r"\(2 times here, with that of --speed-positions\).* --speed-positions none, or"),
        (each * 3 // 2, 2, False, r"\(2 times here\), and .*leave --index out, start fewer ranks on a host"),
        (each * 2, 2, True, r"\(3 times here.*none, start fewer ranks on a host, or take a host with"),
    ):
        monkeypatch.setattr(knn, "host_bytes", lambda whole=whole: whole)
        with pytest.raises(UserError, match=rf"--index run/index is .*{words}"):
            knn._require_memory(index, keys, num_ranks, measures_fewer=measures_fewer)
        enough = each * (num_ranks + measures_fewer)
        monkeypatch.setattr(knn, "host_bytes", lambda enough=enough: enough)
        knn._require_memory(index, keys, num_ranks, measures_fewer=measures_fewer)


def test_each_rank_of_a_host_counts_for_the_memory_that_an_index_takes(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.index is not None
    size = bytes_in_memory(open_index(config.index), open_keys(config.keys).dim)
    monkeypatch.setattr(knn, "host_bytes", lambda: size * 3 // 2)
    world = World(rank=0, size=2, local_size=2)
    alone = replace(config, speed_positions=None)
    assert "base+knn_ivfpq" in {arm.name for arm in open_inputs(alone, World()).arms}
    for settings, ranks in ((config, World()), (alone, world)):
        with pytest.raises(UserError, match=r"\(2 times here"):
            open_inputs(settings, ranks)
    assert not (config.output / "identity.json").exists()


def test_each_file_of_the_datastore_is_compared_once_over_all_ranks_and_starts(
    config: Config, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reads it afterwards: units, and the speeds at each size of the datastore."""
    monkeypatch.setattr(verified_inputs, "_MIN_FILES", 1)
    config, hashed = _with_copies(replace(config, samples=0, speed_positions=64), tmp_path), []
    original = files.sha256_of_file

    def counted(path: Path) -> str:
        hashed.append(f"{path.parent.name}/{path.name}")
        return original(path)

    monkeypatch.setattr(files, "sha256_of_file", counted)
    for rank in (1, 0, 1):
        evaluate.run(config, World(rank=rank, size=2))
    expected = [path for pattern in ("keys-*", "values-*") for path in config.keys.glob(pattern + ".npy")]
    expected += config.index.glob("shard-*")
    names = [name for name in hashed if name.partition("/")[2].startswith(("keys-", "values-", "shard-"))]
    assert sorted(names) == sorted(f"{path.parent.name}/{path.name}" for path in expected)
    np.testing.assert_array_equal(
        read_scores(config.output, "test", "base+knn_exact"),
        read_scores(finished.config.output, "test", "base+knn_exact"),
    )


@pytest.mark.parametrize("pattern", ["keys/keys-*.npy", "keys/values-*.npy", "index/shard-*"])
def test_a_flipped_byte_of_the_datastore_is_refused_before_a_score_is_written(
    config: Config, tmp_path: Path, pattern: str
) -> None:
    config = _with_copies(config, tmp_path)
    victim = max((tmp_path / "copies").glob(pattern))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DamagedDataError, match=f"{victim.name} does not have the checksum"):
        evaluate.run(config, World())
    assert not list(config.output.glob("scores/*")) and not (config.output / "report.md").exists()


def _with_copies(config: Config, folder: Path) -> Config:
    """The same with copies of keys and index."""
    assert config.keys is not None and config.index is not None
    keys = shutil.copytree(config.keys, folder / "copies" / "keys")
    return replace(config, keys=keys, index=shutil.copytree(config.index, folder / "copies" / "index"))
