"""Targets against a brute-force oracle: every search, exclusion, weighting and temperature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.maths.exact_limit import MAX_KEYS_FOR_EXACT
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.targets import units, write_targets
from mlpmem_ds.stages.targets.units import auto_shard_positions

from .conftest import NUM_KEYS, NUM_LISTS, SCALE, VOCAB_SIZE, config, result_of, values, vectors


def expect_oracle(
    found: SparseRows,
    codes: np.ndarray,
    tokens: np.ndarray,
    *,
    k: int,
    temperature: float,
    mass: float,
    scale: float = SCALE,
    hidden: Callable[[int, int], bool] = lambda query, key: False,
    kernel: Callable[[float], float] = lambda excess: float(np.exp(-excess)),
) -> None:
    """Row by row, neighbour by neighbour, in float64."""
    for query in range(len(codes)):
        squared = ((codes.astype(np.int64) - codes[query].astype(np.int64)) ** 2).sum(1)
        allowed = [key for key in range(len(codes)) if key != query and not hidden(query, key)]
        nearest = sorted(allowed, key=lambda key: (squared[key], key))[:k]
        row: dict[int, float] = {}
        excess = {key: (squared[key] - squared[nearest[0]]) * scale**2 / temperature for key in nearest}
        total = sum(kernel(excess[key]) for key in nearest)
        for key in nearest:
            weight = kernel(excess[key]) / total
            row[int(tokens[key])] = row.get(int(tokens[key]), 0.0) + weight
        entries = slice(found.offsets[query], found.offsets[query + 1])
        ids, probabilities = found.ids[entries].tolist(), found.probabilities[entries]
        assert ids == sorted(ids)
        assert np.allclose(probabilities, [row[token] for token in ids], rtol=6e-4, atol=6e-8)
        if not row:
            assert not ids and found.dropped[query] == 0
            continue
        assert abs(sum(row[token] for token in ids) + found.dropped[query] - 1) < 6e-4
        head, reached = {int(tokens[query])} & set(row), 0.0  # the gold token stays
        for token in sorted(row, key=lambda token: (-row[token], token)):
            if reached >= mass:
                break
            head, reached = head | {token}, reached + row[token]
        assert set(ids) == {token for token in head if np.float16(row[token]) > 0}


def test_exact_search_equals_the_oracle(keys: Path, tmp_path: Path) -> None:
    write_targets.run(config(keys, tmp_path / "targets"), World())
    targets = open_targets(tmp_path / "targets")
    expect_oracle(targets.read_all(), vectors(), values(), k=20, temperature=6.0, mass=0.9)
    manifest = targets.manifest
    assert (
        manifest.search,
        manifest.k,
        targets.weighting.temperature,
        manifest.temperature_rule,
    ) == (
        "exact",
        20,
        6,
        "fixed",
    )
    assert manifest.rows_short_of_k == manifest.rows_without_neighbours == 0
    assert [shard.count for shard in manifest.shards] == [104, 104, 104, 91]
    assert targets.keys_sha256 == open_keys(keys).sha256
    assert 1 < manifest.neighbour_perplexity < 20


def test_inverse_distances_equal_their_oracle_and_bind_the_directory(keys: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"weighting": "inverse-distance", "temperature": "auto"}
    write_targets.run(config(keys, tmp_path / "targets", neighbour_perplexity=8.0, **changes), World())
    targets = open_targets(tmp_path / "targets")
    assert targets.weighting.kind == "inverse-distance"
    assert abs(targets.manifest.neighbour_perplexity - 8) < 1e-3
    expect_oracle(
        targets.read_all(),
        vectors(),
        values(),
        k=20,
        temperature=targets.weighting.temperature,
        mass=0.9,
        kernel=lambda excess: 1 / (1 + excess),
    )
    changes = {"temperature": "auto", "neighbour_perplexity": 8.0}
    with pytest.raises(UserError, match="another run"):
        write_targets.run(config(keys, tmp_path / "targets", **changes), World())


def test_all_lists_probed_equal_exact_search_bit_for_bit(keys: Path, index: Path, tmp_path: Path) -> None:
    write_targets.run(config(keys, tmp_path / "exact"), World())
    write_targets.run(config(keys, tmp_path / "ivf", index=index, search="ivf", nprobe=NUM_LISTS), World())
    exact, ivf = result_of(tmp_path / "exact"), result_of(tmp_path / "ivf")
    shards = [name for name in exact if name.startswith("knn-")]
    assert len(shards) == 8 and all(exact[name] == ivf[name] for name in shards)


def test_many_shards_lie_in_folders(
    keys: Path, undisturbed: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand a folder; here two. Rows, records and a rerun are as in one folder."""
    monkeypatch.setattr(units, "folder_of", lambda number, count: f"{number // 2:04d}/")
    changes = {"index": index, "search": "ivf", "nprobe": 3}
    write_targets.run(config(keys, tmp_path / "targets", **changes), World())
    found, flat = open_targets(tmp_path / "targets"), open_targets(undisturbed)
    names = [shard.name for shard in found.manifest.shards]
    assert [name.split("/")[0] for name in names] == ["0000", "0000", "0001", "0001"]
    assert [name.split("/")[1] for name in names] == [shard.name for shard in flat.manifest.shards]
    some = np.array([0, 105, 311, 312, NUM_KEYS - 1])
    assert equal_rows(found.gather(some), flat.gather(some)) and equal_rows(found.read_all(), flat.read_all())
    (tmp_path / "targets" / names[2]).write_bytes(b"")
    (tmp_path / "targets" / "manifest.json").unlink()
    write_targets.run(config(keys, tmp_path / "targets", **changes), World())
    assert equal_rows(open_targets(tmp_path / "targets").read_all(), flat.read_all())


def equal_rows(one: SparseRows, other: SparseRows) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("offsets", "ids", "probabilities")
    )


def test_the_size_of_a_shard_follows_the_positions() -> None:
    assert [auto_shard_positions(count) for count in (1, 10**8, 5 * 10**8, 5 * 10**9, 2 * 10**11)] == [
        1 << 17,
        1 << 17,
        1 << 18,
        1 << 20,
        1 << 20,
    ]


@pytest.mark.parametrize("factory", ["IVF40_HNSW4,PQ3x4"])
def test_lists_reached_through_a_graph_give_the_oracle_over_them(
    keys: Path, tmp_path: Path, factory: str
) -> None:
    build_index.run(build_index.Config(keys=keys, output=tmp_path / "index", factory=factory), World())
    changes = {"index": tmp_path / "index", "search": "ivf", "nprobe": 8}
    for name, ranks in (("one", 1), ("two", 2)):
        for rank in range(ranks):
            write_targets.run(config(keys, tmp_path / name, **changes), World(rank=rank, size=ranks))
    assert result_of(tmp_path / "one") == result_of(tmp_path / "two")
    trained = Index.read(tmp_path / "index" / "trained.faissindex")
    homes, probes = trained.assign(vectors(), 1)[:, 0], trained.assign(vectors(), 8)
    assert np.mean(homes == probes[:, 0]) > 0.99
    expect_oracle(
        open_targets(tmp_path / "one").read_all(),
        vectors(),
        values(),
        k=20,
        temperature=6.0,
        mass=0.9,
        hidden=lambda query, key: homes[key] not in probes[query],
    )


def test_few_lists_give_the_oracle_over_those_lists(keys: Path, index: Path, undisturbed: Path) -> None:
    probes = Index.read(index / "trained.faissindex").assign(vectors(), NUM_LISTS)
    expect_oracle(
        open_targets(undisturbed).read_all(),
        vectors(),
        values(),
        k=20,
        temperature=6.0,
        mass=0.9,
        hidden=lambda query, key: probes[key, 0] not in probes[query, :3],
    )
    is_found_QK = (probes[:, 0] == probes[:, :3, None]).any(1)  # of each query's own lists
    num_short = int((is_found_QK.sum(1) - 1 < 20).sum())  # without itself
    assert open_targets(undisturbed).manifest.rows_short_of_k == num_short


def test_a_window_and_more_neighbours_than_keys(keys: Path, tmp_path: Path) -> None:
    write_targets.run(config(keys, tmp_path / "targets", k=500, mass=1.0, exclude_window=2), World())
    targets = open_targets(tmp_path / "targets")
    expect_oracle(
        targets.read_all(),
        vectors(),
        values(),
        k=500,
        temperature=6.0,
        mass=1.0,
        hidden=lambda query, key: abs(query - key) <= 2,
    )
    assert targets.manifest.rows_short_of_k == NUM_KEYS and targets.manifest.exclude.window == 2
    write_targets.run(config(keys, tmp_path / "none", exclude_window=NUM_KEYS), World())
    nothing = open_targets(tmp_path / "none")
    assert nothing.manifest.rows_without_neighbours == NUM_KEYS and not len(nothing.read_all().ids)


@pytest.mark.parametrize("search", ["exact", "ivf"])
def test_the_same_document_is_excluded(keys_dir: Path, corpus_dir: Path, tmp_path: Path, search: str) -> None:
    keys = open_keys(keys_dir)
    changes: dict[str, Any] = {
        "exclude": "same-document",
        "corpus": corpus_dir,
        "shard_positions": 1024,
        "temperature": "0.5",
    }
    if search == "ivf":
        build_index.run(
            build_index.Config(keys=keys_dir, output=tmp_path / "index", factory="IVF4,Flat"), World()
        )
        changes |= {"index": tmp_path / "index", "search": "ivf", "nprobe": 4}
    write_targets.run(config(keys_dir, tmp_path / "targets", **changes), World())
    corpus = open_corpus(corpus_dir)
    documents = np.repeat(
        np.arange(len(corpus.documents)), [document["tokens"] for document in corpus.documents]
    )[1:]
    tokens = corpus.values(0, corpus.num_positions)
    targets = open_targets(tmp_path / "targets")
    assert targets.inputs["corpus"] == corpus.sha256 and targets.manifest.exclude.rule == "same-document"
    # The oracle is slow: some rows from every part, the codes' own scale.
    codes, found = keys.read("keys"), targets.read_all()
    for query in range(0, keys.num_positions, 97):
        squared = ((codes.astype(np.int64) - codes[query].astype(np.int64)) ** 2).sum(1)
        squared[documents == documents[query]] = np.iinfo(np.int64).max
        nearest = np.lexsort((np.arange(len(codes)), squared))[:20]
        weights = np.exp(-(squared[nearest] - squared[nearest[0]]) * keys.scale**2 / 0.5)
        expected = np.bincount(tokens[nearest], weights=weights / weights.sum(), minlength=corpus.vocab_size)
        entries = slice(found.offsets[query], found.offsets[query + 1])
        assert np.allclose(found.probabilities[entries], expected[found.ids[entries]], rtol=6e-4, atol=6e-8)
        assert expected[found.ids[entries]].sum() >= 0.9 - 1e-9


def test_temperature_reaches_the_wanted_perplexity(keys: Path, tmp_path: Path) -> None:
    write_targets.run(
        config(keys, tmp_path / "targets", temperature="auto", neighbour_perplexity=12.0), World()
    )
    manifest = open_targets(tmp_path / "targets").manifest
    assert manifest.temperature_rule == "auto" and abs(manifest.neighbour_perplexity - 12) < 1e-3
    squared = np.sort(
        ((vectors()[:, None].astype(float) - vectors()[None]) ** 2).sum(-1) + np.diag([np.inf] * NUM_KEYS),
        axis=1,
    )
    weights = np.exp(-squared[:, :20] * SCALE**2 / manifest.weighting.temperature)
    weights /= weights.sum(1, keepdims=True)
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(1)
    assert abs(np.exp(entropy.mean()) - 12) < 1e-3


def test_raw_keys_find_the_neighbours_of_the_oracle(make_keys: Callable[..., Path], tmp_path: Path) -> None:
    codes = vectors()[:100]  # whole numbers: exact in float32 too
    keys = make_keys(
        tmp_path / "keys", codes.astype(np.float16), values()[:100], vocab_size=VOCAB_SIZE, scale=1.0
    )
    build_index.run(build_index.Config(keys=keys, output=tmp_path / "index", factory="IVF3,Flat"), World())
    for name, changes in (
        ("exact", {}),
        ("ivf", {"index": tmp_path / "index", "search": "ivf", "nprobe": 3}),
    ):
        write_targets.run(config(keys, tmp_path / name, **changes), World())
        expect_oracle(
            open_targets(tmp_path / name).read_all(),
            codes,
            values()[:100],
            k=20,
            temperature=6,
            mass=0.9,
            scale=1,
        )


@pytest.mark.parametrize(("started", "most", "now"), [("exact", 10**6, 10), ("ivf", 10, 10**6)])
def test_an_automatic_search_goes_on_as_it_was_begun_on_a_machine_with_another_device(
    keys: Path,
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    started: str,
    most: int,
    now: int,
) -> None:
    automatic = config(keys, tmp_path / "targets", index=index)
    monkeypatch.setitem(MAX_KEYS_FOR_EXACT, "cpu", most)
    write_targets.run(automatic, World())
    before = result_of(automatic.output)
    assert open_targets(automatic.output).manifest.search == started
    (automatic.output / "manifest.json").unlink()
    min(automatic.output.glob("knn-*.tar*")).unlink()
    monkeypatch.setitem(MAX_KEYS_FOR_EXACT, "cpu", now)
    with caplog.at_level("INFO", logger="mlpmem_ds"):
        write_targets.run(automatic, World())
    assert result_of(automatic.output) == before
    assert f"search {started} (chosen when this run was first started" in caplog.text


@pytest.mark.parametrize(("k", "wanted"), [(1024, 100.0), (200, 100.0), (64, 32.0), (3, 1.5), (2, 1.5)])
def test_perplexity_follows_a_small_k(keys: Path, tmp_path: Path, k: int, wanted: float) -> None:
    assert config(keys, tmp_path / "targets", k=k, temperature="auto").perplexity == wanted
