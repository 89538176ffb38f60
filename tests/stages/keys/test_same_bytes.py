"""The same keys from any number of ranks, after a failure, and with flags that decide nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core import stage_directory
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.log import read_events
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.keys.extract_keys import Config

from .conftest import CODECS, result_of


def run_apart(config: Config, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank makes the units that it is dealt, and none of the others'; the last one completes the
    directory."""
    with monkeypatch.context() as patch:
        patch.setattr(stage_directory, "free_units", lambda *_: iter(()))
        patch.setattr(StageDirectory, "_wait", lambda self, units, until_whole=False: None)
        for rank in range(size):
            assert not (config.output / "manifest.json").exists()
            extract_keys.run(config, World(rank=rank, size=size))


@pytest.mark.parametrize("codec", CODECS)
def test_ranks_share_the_work_byte_for_byte(
    config: Config, tmp_path: Path, other_base: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = CODECS[codec]
    config = replace(
        config, **changes | ({"input_model": str(other_base)} if "input_model" in changes else {})
    )
    extract_keys.run(config, World())
    for size in (2, 3):
        shared = replace(config, output=tmp_path / f"shared{size}")
        run_apart(shared, size, monkeypatch)
        assert result_of(config.output) == result_of(shared.output)
        makers = {
            event["rank"] for event in read_events(shared.output / "log.jsonl") if event["event"] == "unit"
        }
        assert makers == set(range(size))


def test_batch_and_threads_change_few_codes_and_none_by_more_than_one(config: Config, tmp_path: Path) -> None:
    """The bound that formats/README.md states: the codec is fitted window by window, so only the roundings
    differ."""
    extract_keys.run(replace(config, input_codec="int8", batch_windows=1), World())
    one, threads_before = open_keys(config.output), torch.get_num_threads()
    for size, threads in ((3, 1), (64, 1), (64, 3)):
        other = replace(config, input_codec="int8", batch_windows=size, output=tmp_path / f"{size}-{threads}")
        torch.set_num_threads(threads)
        try:
            extract_keys.run(other, World())
        finally:
            torch.set_num_threads(threads_before)
        keys = open_keys(other.output)
        assert keys.scale == pytest.approx(one.scale, rel=1e-5)
        for array in ("keys", "inputs"):
            steps = np.abs(keys.read(array).astype(int) - one.read(array))
            assert steps.max() <= 1 and (steps > 0).mean() <= 1e-4
        np.testing.assert_allclose(keys.read("log_probabilities"), one.read("log_probabilities"), atol=1e-4)


def test_a_broken_run_continues_to_the_same_bytes(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_keys.run(config, World())
    broken = replace(config, output=tmp_path / "broken")
    real, calls = extract_keys._extract_unit, []

    def fail_late(*arguments: Any) -> dict[str, Any]:
        summary = real(*arguments)
        calls.append(summary)
        if len(calls) == 2:
            raise RuntimeError("killed after the files, before the record")
        return summary

    monkeypatch.setattr(extract_keys, "_extract_unit", fail_late)
    with pytest.raises(RuntimeError):
        extract_keys.run(broken, World())
    extract_keys.run(broken, World())
    assert result_of(config.output) == result_of(broken.output)


def test_flags_that_fit_the_codec_do_not_bind_raw_keys(config: Config) -> None:
    raw = replace(config, codec="raw", input_codec="none")
    extract_keys.run(raw, World())
    before = result_of(config.output)
    extract_keys.run(replace(raw, seed=5, fit_positions=99), World())
    assert result_of(config.output) == before
    with pytest.raises(UserError, match=r"--codec was 'raw', now 'int8'"):
        extract_keys.run(replace(config, input_codec="none"), World())
