"""The audit of stored keys, against brute force over raw hidden states in float64."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core import stage_directory
from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import TransformersSource, scan_positions
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.stages.keys import audit as key_audit
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.keys.extract_keys import Config


@pytest.fixture(scope="module")
def config(base_dir: Path, corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Keys of 6 of 16 dimensions, complete, without an audit."""
    output = tmp_path_factory.mktemp("audited") / "keys"
    config = Config(
        model=str(base_dir), corpus=corpus_dir, output=output, unit_positions=256, dim=6, input_codec="none"
    )
    extract_keys.run(config, World())
    return config


@pytest.fixture(scope="module")
def states(config: Config) -> np.ndarray:
    """The raw keys, float64 [N, D]."""
    corpus, source = open_corpus(config.corpus), TransformersSource(config.model)
    block = Block(0, corpus.num_positions)
    scan = scan_positions(source, corpus, block, {"key": CapturePoint(layer=1)}, batch_windows=16)
    return np.concatenate([rows.states["key"].numpy() for rows in scan]).astype(np.float64)


def audit_of(config: Config) -> dict[str, Any]:
    extract_keys.run(config, World())
    return json.loads((config.output / "audit.json").read_text())


def nearest(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, squared distances) of the k nearest of all rows of float64 vectors, ties to the lower id."""
    squared = np.square(vectors[queries][:, None] - vectors[None]).sum(-1)
    squared[np.arange(len(queries)), queries] = np.inf
    ids = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(squared, ids, axis=1)


def distributions(squared: np.ndarray, values: np.ndarray, perplexity: float) -> np.ndarray:
    """The rows' targets, dense [Q, 300], at the temperature of this perplexity, found on a grid and then
    halved."""
    low, high = -10.0, 15.0
    for _ in range(80):
        middle = (low + high) / 2
        weights = np.exp(-(squared - squared[:, :1]) / np.exp(middle))
        weights /= weights.sum(1, keepdims=True)
        entropies = -np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1)), 0).sum(1)
        low, high = (low, middle) if entropies.mean() > np.log(perplexity) else (middle, high)
    return np.stack(
        [np.bincount(row, weights=part, minlength=300) for row, part in zip(values, weights, strict=True)]
    )


def test_the_figures_are_those_of_brute_force(
    config: Config, states: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_audit, "_CHUNK", 300)
    monkeypatch.setattr(key_audit, "_K", 400)
    monkeypatch.setattr(key_audit, "_ROWS_AT_ONCE", 17)
    drawn: list[np.ndarray] = []
    real = key_audit._read_queries
    monkeypatch.setattr(
        key_audit,
        "_read_queries",
        lambda *arguments: [drawn.append(found[0]) or found for found in [real(*arguments)]][0],
    )
    audit = audit_of(replace(config, audit=40, audit_dims=(6, 16)))
    (queries,) = drawn
    keys = open_keys(config.output)
    values = keys.read("values").astype(int)
    assert audit["num_queries"] == len(queries) == len(set(queries.tolist())) == 40
    assert (audit["num_candidates"], audit["candidate_share"], audit["k"]) == (len(states), 1.0, 400)
    true_ids, true_squared = nearest(states, queries, 400)
    ids, squared = nearest(keys.read("keys").astype(np.float64) * keys.scale, queries, 400)
    stored, six, sixteen = audit["arms"]
    assert [arm["name"] for arm in audit["arms"]] == ["stored int8 6", "int8 6", "int8 16"]
    hits = [
        len(set(row) & set(true)) / 400 for row, true in zip(ids.tolist(), true_ids.tolist(), strict=True)
    ]
    assert stored["recall"] == pytest.approx(np.mean(hits), abs=1e-3)
    for name, perplexity in {"soft": 300, "sharp": 30}.items():
        truth = distributions(true_squared, values[true_ids], perplexity)
        found = distributions(squared, values[ids], perplexity)
        expected = np.abs(truth - found).sum(1).mean() / 2
        assert stored["total_variation"][name] == pytest.approx(expected, abs=1e-3)
        assert six["total_variation"][name] == pytest.approx(stored["total_variation"][name], abs=1e-3)
        assert sixteen["total_variation"][name] < 0.3 * expected
    assert stored["energy_kept"] == six["energy_kept"] < sixteen["energy_kept"] == pytest.approx(1)
    assert stored["recall"] < sixteen["recall"] and (stored["bytes"], sixteen["bytes"]) == (6, 16)


def test_an_audit_is_no_part_of_the_keys_and_is_made_once(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = (config.output / "manifest.json").read_bytes()
    asked = replace(config, audit=10)
    first = audit_of(asked)
    path = config.output / "audit.json"
    assert (config.output / "manifest.json").read_bytes() == manifest and b"audit.json" not in manifest
    with monkeypatch.context() as patch:
        patch.setattr(key_audit, "measure", None)  # would fail
        with caplog.at_level(logging.INFO, logger="mlpmem_ds"):
            assert audit_of(asked) == first
    lines = [record.message for record in caplog.records]
    assert any("10 queries, 1,600 candidates (100.0% of the corpus), k = 1,024" in line for line in lines)
    assert any(line.split()[:3] == ["stored", "int8", "6"] for line in lines)
    path.write_text(path.read_text()[:50])
    assert audit_of(asked) == first
    stale = json.loads(path.read_text()) | {"keys": "0" * 64, "num_queries": 99}
    path.write_text(json.dumps(stale))
    assert audit_of(asked) == first
    assert audit_of(replace(asked, audit=11))["num_queries"] == 11


def test_a_killed_audit_leaves_none_and_begins_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(config, audit=12)
    (config.output / "audit.json").unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(key_audit, "_compare", lambda *arguments: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError):
            audit_of(asked)
    assert not (config.output / "audit.json").exists()
    assert audit_of(asked)["num_queries"] == 12


def test_candidates_are_bounded_and_a_temperature_out_of_reach_is_no_number(config: Config) -> None:
    audit = audit_of(replace(config, audit=10, audit_candidates=200))
    assert 200 <= audit["num_candidates"] <= 232 and audit["candidate_share"] < 0.15
    assert audit["k"] == audit["num_candidates"] - 1
    (arm,) = audit["arms"]
    assert arm["recall"] == 1.0  # all the others
    assert arm["total_variation"]["soft"] is None and arm["total_variation"]["sharp"] > 0
    assert any(
        line.split()[-2:] == ["-", f"{arm['total_variation']['sharp']:.4f}"]
        for line in key_audit.table(audit)
    )


@pytest.mark.parametrize("raw_dtype", ["float16", "bfloat16"])
def test_raw_keys_are_audited_too(config: Config, tmp_path: Path, raw_dtype: str) -> None:
    raw = replace(
        config,
        codec="raw",
        raw_dtype=raw_dtype,
        dim=None,
        audit=10,
        audit_dims=(16,),
        output=tmp_path / "raw",
    )
    stored, codes = audit_of(raw)["arms"]
    assert stored["name"] == f"stored {raw_dtype} 16" and stored["bytes"] == 32
    assert stored["recall"] > 0.99 and stored["total_variation"]["sharp"] < (
        1e-3 if raw_dtype == "float16" else 1e-2
    )
    assert codes["energy_kept"] == pytest.approx(1)


def test_the_rank_that_completes_the_keys_audits_and_is_heard(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = replace(config, audit=10, output=tmp_path / "shared")
    monkeypatch.setattr(stage_directory, "free_units", lambda *_: iter(()))
    monkeypatch.setattr(StageDirectory, "_wait", lambda self, units, until_whole=False: None)
    extract_keys.run(shared, World(rank=0, size=2))
    assert not (shared.output / "audit.json").exists()
    extract_keys.run(shared, World(rank=1, size=2))
    assert json.loads((shared.output / "audit.json").read_text())["num_queries"] == 10
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("10 queries, 1,600 candidates" in line for line in warnings)
