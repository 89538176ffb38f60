"""write_targets against a brute-force oracle; the same files from any ranks, threads, batches, after a kill,
after damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.target_shards import index_name
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.targets import write_targets
from mlpmem_ds.stages.targets.teacher import Teacher

NUM_KEYS, DIM, VOCAB_SIZE, SCALE = 403, 6, 40, 0.5
NUM_LISTS = 7


def result_of(root: Path, *, without_lists: bool = False) -> dict[str, bytes]:
    """Every file of the result; `without_lists`: but for keys in list order, which a killed run may leave to
    the next."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.name not in ("run.json", "log.jsonl")
        and not path.name.endswith((".tmp", ".claim"))
        and not (without_lists and path.relative_to(root).parts[0] in ("lists", ".lists.removed"))
    }


def vectors() -> np.ndarray:
    """Small numbers, so that distances tie; some keys are there twice."""
    codes = np.random.default_rng(0).integers(-6, 7, size=(NUM_KEYS, DIM)).astype(np.int8)
    codes[200:230] = codes[:30]
    return codes


def values() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB_SIZE, NUM_KEYS)


@pytest.fixture(scope="module")
def keys(make_keys: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keys") / "keys"
    return make_keys(
        root, vectors(), values(), vocab_size=VOCAB_SIZE, scale=SCALE, unit_positions=96, block_size=8
    )


@pytest.fixture(scope="module")
def index(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index") / "index"
    build_index.run(
        build_index.Config(keys=keys, output=root, factory=f"IVF{NUM_LISTS},PQ3x4", num_shards=2), World()
    )
    return root


def config(keys_dir: Path, output_dir: Path, **changes: Any) -> write_targets.Config:
    settings = {
        "keys": keys_dir,
        "output": output_dir,
        "k": 20,
        "temperature": "6",
        "mass": 0.9,
        "shard_positions": 104,
        "encoding": "exact",
    }
    return write_targets.Config(**{**settings, **changes})


@pytest.fixture(scope="module")
def undisturbed(keys: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("targets") / "targets"
    write_targets.run(config(keys, root, index=index, search="ivf", nprobe=3), World())
    return root


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
    assert open_targets(undisturbed).manifest.rows_short_of_k >= 0


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


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_give_the_same_files(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path, size: int
) -> None:
    for rank in range(size):  # the owner of `temperature` first, so that nobody waits
        write_targets.run(
            config(keys, tmp_path / "targets", index=index, search="ivf", nprobe=3),
            World(rank=rank, size=size),
        )
    assert result_of(tmp_path / "targets") == result_of(undisturbed)


@pytest.mark.parametrize(("batch_positions", "threads"), [(1, 1), (24, 2), (57, 1), (10**6, 2)])
def test_batches_and_threads_change_nothing(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path, batch_positions: int, threads: int
) -> None:
    before = torch.get_num_threads()
    changes = {"batch_positions": batch_positions, "threads": threads}
    write_targets.run(
        config(keys, tmp_path / "targets", index=index, search="ivf", nprobe=3, **changes), World()
    )
    torch.set_num_threads(before)
    assert result_of(tmp_path / "targets") == result_of(undisturbed)


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_a_failed_unit_leaves_the_others(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    wanted = config(
        keys, tmp_path / "targets", index=index, search="ivf", nprobe=3, batch_positions=104, threads=1
    )
    calls = 0
    original = Teacher.find

    def search(self: Any, positions: np.ndarray, **flags: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > failing:
            raise RuntimeError("pulled the plug")
        return original(self, positions, **flags)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        patch.setattr(Teacher, "find", search)
        write_targets.run(wanted, World())
    done = tmp_path / "targets" / "done"  # the sample is measured before anything is written
    assert len(list(done.glob("*.json"))) == failing if failing else not done.parent.exists()
    assert not (tmp_path / "targets" / "manifest.json").exists()
    write_targets.run(wanted, World())
    assert result_of(tmp_path / "targets") == result_of(undisturbed)


@pytest.fixture(scope="module")
def compact(keys: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compact encoding, plain tar, fitted temperature."""
    root = tmp_path_factory.mktemp("compact") / "targets"
    write_targets.run(config(keys, root, **COMPACT, index=index), World())
    return root


COMPACT: dict[str, Any] = {
    "encoding": "compact",
    "container": "tar",
    "temperature": "auto",
    "neighbour_perplexity": 8.0,
    "search": "ivf",
    "nprobe": 3,
}


@pytest.mark.parametrize(
    ("ranks", "threads", "batch_positions"), [(1, 2, 8), (2, 1, 24), (3, 2, 10**6), (4, 1, 57)], ids=str
)
def test_compact_targets_are_the_same_bytes(
    keys: Path, index: Path, compact: Path, tmp_path: Path, ranks: int, threads: int, batch_positions: int
) -> None:
    before = torch.get_num_threads()
    wanted = config(
        keys, tmp_path / "targets", **COMPACT, index=index, threads=threads, batch_positions=batch_positions
    )
    for rank in range(ranks):
        write_targets.run(wanted, World(rank=rank, size=ranks))
    torch.set_num_threads(before)
    assert result_of(tmp_path / "targets") == result_of(compact)


@pytest.mark.parametrize("container", ["tar.zst", "tar"])
def test_encodings_hold_the_same_rows(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path, container: str
) -> None:
    changes = {"index": index, "search": "ivf", "nprobe": 3, "encoding": "compact", "container": container}
    write_targets.run(config(keys, tmp_path / "targets", **changes), World())
    compact, exact = open_targets(tmp_path / "targets"), open_targets(undisturbed)
    assert (compact.encoding, compact.container, exact.encoding) == ("compact", container, "exact")
    found, expected = compact.read_all(), exact.read_all()
    assert np.array_equal(found.offsets, expected.offsets) and np.array_equal(found.ids, expected.ids)
    row_of_entry = np.repeat(np.arange(NUM_KEYS), np.diff(found.offsets))
    differences = np.abs(found.probabilities.astype(float) - expected.probabilities)
    assert np.bincount(row_of_entry, weights=differences).mean() / 2 < 0.003
    sums = np.bincount(row_of_entry, weights=found.probabilities) + found.dropped
    assert np.allclose(sums, 1, atol=1e-5)
    assert compact.encoding == "compact" and exact.encoding == "exact"
    assert {shard.name.split(".", 1)[1] for shard in compact.manifest.shards} == {container}


def test_killed_runs_leave_the_undisturbed_bytes(
    keys: Path, index: Path, killed_runs: Callable[..., int], tmp_path: Path
) -> None:
    wanted = config(keys, tmp_path / "targets", **COMPACT, index=index, threads=1, batch_positions=8)
    undisturbed: dict[str, bytes] = {}

    def check(output: Path) -> None:
        undisturbed.update(undisturbed or result_of(tmp_path / "targets-undisturbed"))
        assert result_of(output, without_lists=True) == undisturbed

    assert killed_runs(write_targets.run, wanted, ranks=2, kills=20, check=check) == 20
    assert result_of(tmp_path / "targets") == undisturbed and not (tmp_path / "targets/lists").exists()


def test_a_flipped_byte_is_repaired_and_nothing_else_is_made(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path
) -> None:
    root = tmp_path / "targets"
    wanted = config(keys, root, index=index, search="ivf", nprobe=3)
    write_targets.run(wanted, World())
    names = [shard.name for shard in open_targets(root).manifest.shards]
    for damaged in (names[1], index_name(names[2])):
        content = bytearray((root / damaged).read_bytes())
        content[len(content) // 2] ^= 4
        (root / damaged).write_bytes(content)
        times = {name: (root / name).stat().st_mtime_ns for name in names if not damaged.startswith(name)}
        write_targets.run(wanted, World())
        assert result_of(root) == result_of(undisturbed)
        assert {name: (root / name).stat().st_mtime_ns for name in times} == times


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
        ({"nprobe": 0}, "--nprobe must be at least 1, not 0"),
        ({"shard_positions": 0}, "--shard-positions must be at least 1, not 0"),
        ({"exclude_window": -1}, "--exclude-window must be at least 0, not -1"),
        ({"exclude": "same-document"}, "give --corpus"),
        ({"audit": -1}, "--audit must be at least 1, not -1"),
        ({"raw_keys": Path("raw")}, "say --audit"),
    ],
)
def test_bad_flags(keys: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(keys, tmp_path / "targets", **changes)


@pytest.mark.parametrize(("k", "wanted"), [(1024, 100.0), (200, 100.0), (64, 32.0), (3, 1.5), (2, 1.5)])
def test_perplexity_follows_a_small_k(keys: Path, tmp_path: Path, k: int, wanted: float) -> None:
    assert config(keys, tmp_path / "targets", k=k, temperature="auto").perplexity == wanted


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
    keys: Path, index: Path, tmp_path: Path, damaged: str
) -> None:
    for name, root in (("keys", keys), ("index", index)):
        shutil.copytree(root, tmp_path / name)
    path = sorted((tmp_path / damaged).glob("keys-*.npy" if damaged == "keys" else "shard-*"))[-1]
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    settings = config(tmp_path / "keys", tmp_path / "targets", search="ivf", index=tmp_path / "index")
    with pytest.raises(
        DamagedDataError, match=f"{path.name} does not have the checksum.*run the stage that made"
    ):
        write_targets.run(settings, World())
    assert not settings.output.exists()


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
        "neighbour_perplexity": 7.0,
    }
    write_targets.run(config(keys, tmp_path / "targets", **changes), World())
    assert result_of(tmp_path / "targets") == before
    identity = json.loads(before["identity.json"])["config"]
    assert (
        identity["search"] == "exact" and "neighbour_perplexity" not in identity
    )  # a fixed temperature decides
    fitted = {"temperature": "auto", "neighbour_perplexity": 7.0}
    write_targets.run(config(keys, tmp_path / "fitted", **fitted), World())
    with pytest.raises(UserError, match="another run"):
        write_targets.run(
            config(keys, tmp_path / "fitted", **{**fitted, "neighbour_perplexity": 8.0}), World()
        )
