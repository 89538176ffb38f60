"""Ranks that share a folder: every operation, a slow rank, one that is killed, one that fails."""

import pytest


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_exchange_and_wait_for_a_slow_one(run_ranks, check_everything, size):
    check_everything(run_ranks("files", size, "everything"))


def test_a_killed_rank_is_named(run_ranks):
    results = run_ranks("files", 3, "killed")[::2]
    assert [result["lost"] for result in results] == [(1,), (1,)]
    assert any("no sign of life" in result["said"] for result in results)  # who sees it first tells the other
    assert all(result["seconds"] < 20 for result in results)


def test_a_rank_that_fails_ends_the_others_at_once(run_ranks):
    for result in run_ranks("files", 3, "failed")[::2]:
        assert result["lost"] == (1,) and "rank 1 has failed" in result["said"]
        assert result["seconds"] < 20
