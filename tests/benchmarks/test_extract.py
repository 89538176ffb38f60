"""Benchmark `extract` at toy size: the arms do what they are named for, and the JSON holds what is
promised."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.stages.keys import extract_keys


@pytest.fixture
def bench() -> Any:
    return importlib.import_module("mlpmem_ds.benchmarks.extract")


def test_report(bench: Any, tmp_path: Path) -> None:
    output = tmp_path / "extract.json"
    bench.run(bench.Config(output=output, toy=True, runs=2, device="cpu"), World())
    report = json.loads(output.read_text())
    assert report["name"] == "extract" and report["settings"]["toy"] is True
    ratios = report["ratios"]
    assert {"int8_over_forward", "int8_over_body", "raw_over_forward", "int8_over_forward_d256"} <= set(
        ratios
    )
    assert {"peak_memory_8x_over_1x", "bytes_per_token_int8", "bytes_per_token_int8_and_bf16_inputs"} <= set(
        ratios
    )
    assert all(np.isfinite(value) and value > 0 for value in ratios.values())
    # 32 numbers, value and log-probability; inputs take 2 bytes a number; the rest is small files on large
    # blocks.
    assert 32 + 2 + 4 < ratios["bytes_per_token_int8"] < ratios["bytes_per_token_int8_and_bf16_inputs"]
    rows = {(row["arm"], row["metric"]): row for row in report["rows"]}
    for shape in ("d256", "d768"):
        for arm in ("forward", "body", "int8", "raw"):
            row = rows[f"{shape} {arm}", "tokens_per_second"]
            assert row["runs"] == 2 and 0 < row["min"] <= row["median"] <= row["max"]
    assert {"512 positions", "4096 positions"} == {
        arm for arm, metric in rows if metric == "peak_memory_above_start"
    }


def test_its_corpus_and_model_are_extracted_whole(bench: Any, tmp_path: Path) -> None:
    shape = bench._toy(bench._LONG)
    base, corpus = (
        bench._write_base(shape, tmp_path / "base"),
        bench._write_corpus(shape, 300, tmp_path / "corpus"),
    )
    assert open_corpus(corpus).num_positions == 300 and len(open_corpus(corpus).windows()) == 10
    config = bench._extraction(
        bench.Config(output=tmp_path / "x.json", device="cpu"),
        shape,
        base,
        corpus,
        tmp_path / "keys",
        codec="int8",
    )
    assert bench._seconds_of_units(config) > 0 and not config.output.exists()
    extract_keys.run(config, World())
    assert open_keys(config.output).num_positions == 300


@pytest.mark.parametrize("name", ["positions", "long_positions", "runs", "batch_windows"])
def test_wrong_sizes(bench: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be at least 1, not 0"):
        bench.Config(output=Path("unused"), **{name: 0})
