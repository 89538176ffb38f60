"""The measures of search: small, the same code."""

from __future__ import annotations

from pathlib import Path

from mlpmem_ds.benchmarks.scale.search import MEASURES, device_ops_per_query_1e7, key_uploads_per_run


def test_launches_a_query_are_few_and_those_of_a_call(tmp_path: Path) -> None:
    sizes = {"num_keys": 4_000, "num_lists": 64, "num_queries": 256, "nprobe": 8, "k": 16, "num_dims": 8}
    whole = device_ops_per_query_1e7(tmp_path, **sizes, part=1)
    assert 0 < whole < 20
    assert device_ops_per_query_1e7(tmp_path, **sizes, part=2) < 1.5 * whole  # of as many queries


def test_keys_go_to_the_gpu_once_and_all_goals_are_met(tmp_path: Path) -> None:
    assert key_uploads_per_run(tmp_path, num_keys=3000, calls=6, threads=3) == 1
    for measure in MEASURES[1:]:
        assert measure.is_met_by(measure.function(tmp_path)), measure.name
