from __future__ import annotations

from pathlib import Path

from mlpmem_ds.benchmarks.scale.extraction import MEASURES


def test_only_what_is_stored_leaves_a_gpu(tmp_path: Path) -> None:
    (measure,) = MEASURES
    value = measure.function(tmp_path)
    assert value >= 1 and measure.is_met_by(value)
