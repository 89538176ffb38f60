"""The measures of building an index, small."""

from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.scale import index


def test_a_rank_reads_its_part_of_the_sample(tmp_path: Path) -> None:
    value = index.sample_rows_of_a_rank(tmp_path, num_positions=3 * 10**7, size=8)
    assert value == pytest.approx(1, abs=0.1)


def test_sums_do_not_grow_with_the_keys(tmp_path: Path) -> None:
    value = index.bytes_summed_by_an_iteration(tmp_path, num_lists=16, num_dims=32)
    assert value == 1 + 2 / 32  # and the counts


def test_a_shard_is_a_small_part(tmp_path: Path) -> None:
    assert 2 < index.gigabytes_of_a_shard(tmp_path) < 4
