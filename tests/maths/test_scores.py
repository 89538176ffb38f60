"""Scores against their plain formulas."""

import math

import numpy as np
import pytest

from mlpmem_ds.maths.scores import (
    bits_per_byte,
    bootstrap_interval,
    calibration_error,
    perplexity,
    reliability,
    win_rate,
)


def test_perplexity_and_bits_per_byte_of_known_probabilities():
    log_probabilities = np.log([0.5, 0.25, 0.125]).astype(np.float32)
    assert perplexity(log_probabilities) == pytest.approx(4.0, rel=1e-7)
    assert bits_per_byte(log_probabilities, 12) == pytest.approx(0.5, rel=1e-7)
    assert perplexity(np.array([-1.0, -np.inf])) == perplexity(np.full(3, -800.0)) == math.inf
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(log_probabilities, 0)


def test_perplexity_sums_in_float64():
    assert perplexity(np.full(2**20, -0.1, np.float32)) == pytest.approx(math.exp(np.float32(0.1)), rel=1e-12)


def test_bootstrap_interval_of_a_constant_ratio_is_a_point():
    a = np.log(np.random.default_rng(0).random(1003))
    low, high = bootstrap_interval(a, a + math.log(1.25), block=10)
    assert low == pytest.approx(-0.2) and high == pytest.approx(-0.2)


def test_bootstrap_interval_is_seeded_and_as_wide_as_the_theory_says():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(40_000)
    b = a + 0.05 + rng.standard_normal(40_000)
    low, high = bootstrap_interval(a, b, block=50)
    assert (low, high) == bootstrap_interval(a, b, block=50)
    assert (low, high) != bootstrap_interval(a, b, block=50, seed=1)
    assert low < math.exp(-(b - a).mean()) - 1 < high < 0
    expected_width = 2 * 1.96 / math.sqrt(40_000) * math.exp(-0.05)
    assert high - low == pytest.approx(expected_width, rel=0.15)


def test_blocks_widen_the_interval_of_correlated_positions():
    rng = np.random.default_rng(0)
    differences = np.repeat(
        rng.standard_normal(400), 50
    )  # 50 equal neighbours: 400 independent draws, not 20,000
    widths = [np.diff(bootstrap_interval(np.zeros(20_000), differences, block=block))[0] for block in (1, 50)]
    assert widths[1] / widths[0] == pytest.approx(math.sqrt(50), rel=0.2)


def test_documents_are_drawn_whole():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 90, size=300)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    by_document = rng.standard_normal(300)
    differences = 0.1 * np.repeat(by_document, lengths)
    low, high = bootstrap_interval(np.zeros(lengths.sum()), differences, starts=starts)
    means = []
    for _ in range(2000):  # the definition
        drawn = rng.integers(300, size=300)
        means.append((0.1 * by_document * lengths)[drawn].sum() / lengths[drawn].sum())
    expected = np.quantile(np.expm1(-np.array(means)), [0.025, 0.975])
    np.testing.assert_allclose([low, high], expected, atol=2e-3)
    even = bootstrap_interval(np.zeros(1000), np.arange(1000.0), starts=np.arange(0, 1000, 50))
    assert even == bootstrap_interval(np.zeros(1000), np.arange(1000.0), block=50)
    with pytest.raises(ValueError, match="10 positions make 1 blocks;"):
        bootstrap_interval(np.zeros(10), np.zeros(10), starts=np.array([0]))


def test_bootstrap_refuses_what_it_cannot_resample():
    with pytest.raises(ValueError, match="10 positions make 1 blocks of 512"):
        bootstrap_interval(np.zeros(10), np.zeros(10))
    with pytest.raises(ValueError, match="probability 0"):
        bootstrap_interval(np.zeros(10), np.array([0.0] * 9 + [-np.inf]), block=2)


def test_win_rate_counts_a_tie_as_half():
    assert win_rate(np.array([0.0, 0, 0, -np.inf]), np.array([1.0, -1, 0, -np.inf])) == 0.5
    assert win_rate(np.zeros(4), np.array([1.0, 1, 1, -1])) == 0.75


def test_mistaken_pairs_are_refused():
    for function in (win_rate, bootstrap_interval):
        with pytest.raises(ValueError, match="3 and 4 log-probabilities"):
            function(np.zeros(3), np.zeros(4))
        with pytest.raises(ValueError, match="at least 1"):
            function(np.zeros(0), np.zeros(0))


def test_reliability_by_brute_force():
    generator = np.random.default_rng(5)
    probabilities = np.append(generator.uniform(size=400), [0.0, 1.0])
    outcomes = generator.uniform(size=402) < probabilities**2
    counts, means, shares = reliability(probabilities, outcomes, 7)
    error = 0.0
    for bin in range(7):
        inside = [
            n for n, p in enumerate(probabilities) if bin / 7 <= p < (bin + 1) / 7 or (bin == 6 and p == 1)
        ]
        assert counts[bin] == len(inside)
        assert means[bin] == pytest.approx(probabilities[inside].mean())
        assert shares[bin] == pytest.approx(outcomes[inside].mean())
        error += len(inside) / 402 * abs(probabilities[inside].mean() - outcomes[inside].mean())
    assert calibration_error(probabilities, outcomes, 7) == pytest.approx(error)
    assert error > 0.1
    assert calibration_error(np.array([1.0, 1.0, 0.0]), np.array([True, True, False])) == 0.0
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        calibration_error(np.array([1.2]), np.array([True]))
