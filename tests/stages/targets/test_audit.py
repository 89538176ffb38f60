"""The audit against a brute-force oracle, on several ranks, and its refusal to call damaged rows sound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.targets import audit as target_audit
from mlpmem_ds.stages.targets import write_targets

NUM_KEYS, DIM, VOCAB_SIZE, K, TEMPERATURE = 300, 6, 30, 12, 6.0


@pytest.fixture(scope="module")
def raw(make_keys: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys that are no whole numbers."""
    return make_keys(
        tmp_path_factory.mktemp("raw") / "keys", states(), values(), vocab_size=VOCAB_SIZE, scale=1.0
    )


@pytest.fixture(scope="module")
def keys(make_keys: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    codes = np.rint(states()).astype(np.int8)
    return make_keys(
        tmp_path_factory.mktemp("keys") / "keys", codes, values(), vocab_size=VOCAB_SIZE, scale=1.0
    )


def states() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (NUM_KEYS, DIM)).astype(np.float16)


def values() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB_SIZE, NUM_KEYS)


def config(keys: Path, output: Path, **changes: Any) -> write_targets.Config:
    settings = {
        "k": K,
        "temperature": str(TEMPERATURE),
        "mass": 0.95,
        "shard_positions": 104,
        "audit": NUM_KEYS,
    }
    return write_targets.Config(keys=keys, output=output, **{**settings, **changes})


def read_audit(root: Path) -> dict[str, Any]:
    return json.loads((root / "audit.json").read_text())


def expect_oracle(root: Path, truth_ND: np.ndarray, found_ND: np.ndarray) -> None:
    """Every position by loops: recall at k and 1, total variation, p(gold); `found_ND` is what the targets
    searched."""
    stored, tokens = open_targets(root).read_all(), values()
    recalls, firsts, variations, golds = [], [], [], []
    for query in range(NUM_KEYS):
        nearest = []
        for vectors_ND in (truth_ND, found_ND):
            squared = ((vectors_ND - vectors_ND[query]) ** 2).sum(1)
            squared[query] = np.inf
            nearest.append(np.lexsort((np.arange(NUM_KEYS), squared))[:K])
        squared = ((truth_ND[nearest[0]] - truth_ND[query]) ** 2).sum(1)
        weights = np.exp(-(squared - squared.min()) / TEMPERATURE)
        exact = np.bincount(tokens[nearest[0]], weights=weights / weights.sum(), minlength=VOCAB_SIZE)
        row = np.zeros(VOCAB_SIZE)
        entries = slice(stored.offsets[query], stored.offsets[query + 1])
        row[stored.ids[entries]] = stored.probabilities[entries]
        golds.append(row[tokens[query]])
        recalls.append(len(set(nearest[0]) & set(nearest[1])) / K)
        firsts.append(nearest[0][0] == nearest[1][0])
        variations.append(np.abs(exact - row / row.sum()).sum() / 2)
    audit = read_audit(root)
    assert audit["settings"]["positions"] == NUM_KEYS
    assert audit["recall"]["k"] == pytest.approx(np.mean(recalls))
    assert audit["recall"]["1"] == pytest.approx(np.mean(firsts))
    assert audit["total_variation"] == pytest.approx(np.mean(variations), abs=1e-6)
    assert audit["gold_probability"]["found"] == pytest.approx(np.mean(golds))
    assert set(audit["faulty_rows"].values()) == {0} and audit["rows_validated"] == NUM_KEYS
    assert audit["self_found"] == 1.0


def test_against_raw_keys(keys: Path, raw: Path, tmp_path: Path) -> None:
    write_targets.run(config(keys, tmp_path / "targets", raw_keys=raw), World())
    expect_oracle(tmp_path / "targets", states().astype(float), np.rint(states()).astype(float))
    audit = read_audit(tmp_path / "targets")
    assert audit["settings"]["truth"] == "raw" and 0.5 < audit["recall"]["k"] < 1
    assert (tmp_path / "targets" / "audit.png").read_bytes()[:4] == b"\x89PNG"


def test_exact_search_of_the_same_keys_loses_only_what_is_cut(keys: Path, tmp_path: Path) -> None:
    write_targets.run(config(keys, tmp_path / "targets"), World())
    codes = np.rint(states()).astype(float)
    expect_oracle(tmp_path / "targets", codes, codes)
    audit = read_audit(tmp_path / "targets")
    assert set(audit["recall"].values()) == {1.0}
    assert 0 < audit["total_variation"] < 0.06 and 0 < audit["divergence_nats"] < 1
    assert sum(decile["positions"] for decile in audit["by_list_size"]) == NUM_KEYS


def test_lists_are_told_apart_and_ranks_agree(keys: Path, raw: Path, tmp_path: Path) -> None:
    build_index.run(build_index.Config(keys=keys, output=tmp_path / "index", factory="IVF5,Flat"), World())
    changes = {"index": tmp_path / "index", "search": "ivf", "nprobe": 2, "raw_keys": raw, "audit": 100}
    write_targets.run(config(keys, tmp_path / "one", **changes), World())
    audit = read_audit(tmp_path / "one")
    assert audit["recall"]["k"] < 1 and audit["self_found"] == 1.0
    assert 50 < audit["settings"]["positions"] < 150
    sizes = [(decile["least"], decile["most"]) for decile in audit["by_list_size"]]
    assert sizes == sorted(sizes) and sizes[0][0] < sizes[-1][1] < NUM_KEYS
    for rank in range(2):
        write_targets.run(
            config(keys, tmp_path / "two", **changes, batch_positions=8), World(rank=rank, size=2)
        )
    assert read_audit(tmp_path / "two") == audit


def test_an_audit_goes_on_and_changes_no_target(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "targets"
    write_targets.run(config(keys, root, audit=None), World())
    before = (root / "manifest.json").read_bytes()
    calls = []
    original = target_audit._compare
    monkeypatch.setattr(target_audit, "_UNIT_POSITIONS", 100)

    def compare(*arguments: Any) -> Any:
        calls.append(len(arguments[-1]))
        if len(calls) == 2:
            raise RuntimeError("pulled the plug")
        return original(*arguments)

    monkeypatch.setattr(target_audit, "_compare", compare)
    with pytest.raises(RuntimeError, match="plug"):
        write_targets.run(config(keys, root), World())
    assert not (root / "audit.json").exists()
    with caplog.at_level("INFO", logger="mlpmem_ds"):
        write_targets.run(config(keys, root), World())
    assert calls == [100] * 4  # the part that was done is not done again
    assert (root / "manifest.json").read_bytes() == before
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "recall at 1, 64, k = 12" in said and "faulty rows of 300: none" in said
    write_targets.run(config(keys, root, audit=150), World())
    assert read_audit(root)["settings"]["positions"] < NUM_KEYS


def test_damaged_shards_are_not_audited(keys: Path, tmp_path: Path) -> None:
    root = tmp_path / "targets"
    write_targets.run(config(keys, root, audit=None), World())
    targets = open_targets(root)
    shard = targets.manifest.shards[0]
    content = bytearray((root / shard.name).read_bytes())
    content[-3] ^= 1
    (root / shard.name).write_bytes(content)
    with pytest.raises(DamagedDataError, match="does not have the checksum"):
        target_audit._validate(targets, shard)


@pytest.mark.parametrize("damaged", ["keys-*.npy", "values-*.npy", "shard-*"])
def test_a_later_audit_finds_a_flipped_byte_of_what_it_searches(
    keys: Path, tmp_path: Path, damaged: str
) -> None:
    """The targets are complete and the lists are gone, with the records of what was compared for them."""
    shutil.copytree(keys, tmp_path / "keys")
    index = tmp_path / "index"
    build_index.run(
        build_index.Config(keys=tmp_path / "keys", output=index, factory="IVF4,PQ3x4", num_shards=2), World()
    )
    paths = {"keys": tmp_path / "keys", "output": tmp_path / "targets"}
    write_targets.run(config(**paths, index=index, search="ivf", nprobe=2, audit=None), World())
    path = next(path for root in (index, tmp_path / "keys") for path in sorted(root.glob(damaged)))
    content = path.read_bytes()
    place = len(content) // 2  # in codes of the index, or in rows of the keys
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(DamagedDataError, match=f"{path.name} does not have the checksum"):
        write_targets.run(config(**paths, index=index, search="ivf", nprobe=2), World())
    assert not (tmp_path / "targets/audit.json").exists()
