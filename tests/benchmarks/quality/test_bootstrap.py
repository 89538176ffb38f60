"""Intervals: paired over documents, the union over seeds."""

import numpy as np
import pytest

from mlpmem_ds.benchmarks.quality.bootstrap import ArmSums, estimate

POSITIONS_M = np.array([10, 20, 30, 40])


def _change(ppl):
    return ppl("arm") / ppl("base") - 1


def _tested(*rates, spread=0.0):
    """A base of 2 nats a token, and an arm of so many nats in each seed."""
    base = np.array([2.0, 2.5, 1.5, 2.0]) * POSITIONS_M
    wobble = spread * np.array([1, -1, 1, -1]) * POSITIONS_M
    return ArmSums(
        positions_M=POSITIONS_M,
        sums={"base": [-base], "arm": [-(base + rate * POSITIONS_M + wobble) for rate in rates]},
    )


def test_a_gain_that_is_the_same_in_every_document_has_no_width():
    found = estimate(_tested(-0.1), _change, ("base", "arm"))
    assert found.value == pytest.approx(np.expm1(-0.1))
    assert found.interval == pytest.approx((np.expm1(-0.1), np.expm1(-0.1)))


def test_the_interval_reaches_from_the_lowest_end_of_a_seed_to_the_highest():
    each = [estimate(_tested(rate, spread=0.05), _change, ("base", "arm")) for rate in (-0.3, -0.1, -0.2)]
    together = estimate(_tested(-0.3, -0.1, -0.2, spread=0.05), _change, ("base", "arm"))
    assert together.interval == (each[0].interval[0], each[1].interval[1])
    assert together.by_seed == tuple(one.value for one in each)
    assert together.value == pytest.approx(np.mean(together.by_seed))


def test_the_interval_of_documents_is_that_of_a_bootstrap_by_hand():
    tested = _tested(-0.1, spread=0.2)
    difference_M = tested.sums["base"][0] - tested.sums["arm"][0]
    generator = np.random.default_rng(5)
    draws = [generator.integers(4, size=4) for _ in range(20_000)]
    changes = [np.expm1(difference_M[drawn].sum() / POSITIONS_M[drawn].sum()) for drawn in draws]
    found = estimate(tested, _change, ("base", "arm"))
    assert found.interval == pytest.approx(tuple(np.quantile(changes, [0.025, 0.975])), abs=0.02)


def test_an_arm_that_no_seed_changes_is_paired_with_every_seed():
    tested = _tested(-0.1, -0.2)
    assert tested.num_seeds == 2
    assert tested.seed_sums("base", 1) is tested.seed_sums("base", 0)
    assert tested.ppl("base", 1) == pytest.approx(np.exp((20 + 50 + 45 + 80) / 100))
