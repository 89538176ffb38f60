"""Perplexities of a mixture from two log-probabilities a position, against their plain formulas."""

import math

import numpy as np
import pytest

from mlpmem_ds.maths.scores import perplexity
from mlpmem_ds.models.mixture import Grid
from mlpmem_ds.models.mixture_scores import lambda_curve, mixed_scores


def test_lambda_curve_equals_the_mixture_and_its_ends_are_exact() -> None:
    rng = np.random.default_rng(0)
    base, other = rng.random(100), rng.random(100)
    lambdas = (0, 0.1, 0.35, 1)
    curve = lambda_curve(np.log(base), np.log(other), Grid(lambdas))
    np.testing.assert_allclose(
        curve, [np.exp(-np.log((1 - x) * base + x * other).mean()) for x in lambdas], rtol=1e-13
    )
    assert curve[0] == perplexity(np.log(base)) and curve[-1] == perplexity(np.log(other))


def test_a_zero_probability_of_one_side_is_carried_by_the_other() -> None:
    base, other = np.log([0.5, 0.5]), np.array([math.log(0.5), -math.inf])
    with np.errstate(all="raise"):
        curve = lambda_curve(base, other, Grid((0.0, 0.5, 1.0)))
    np.testing.assert_allclose(curve, [2, 2 * math.sqrt(2), math.inf])


def test_mixed_scores_take_a_number_or_a_value_a_position() -> None:
    rng = np.random.default_rng(1)
    base, other = (np.log(rng.random(50)).astype(np.float32) for _ in range(2))
    lambdas = rng.random(50)
    lambdas[:2] = 0, 1
    mixed = mixed_scores(base, other, lambdas)
    assert mixed.dtype == np.float64 and mixed[0] == base[0] and mixed[1] == other[1]
    for position, weight in enumerate(lambdas):
        assert mixed[position] == pytest.approx(
            mixed_scores(base[position : position + 1], other[position : position + 1], float(weight))[0],
            rel=1e-14,
        )
    np.testing.assert_array_equal(mixed_scores(base, other, 0.0), base.astype(np.float64))
    np.testing.assert_array_equal(mixed_scores(base, other, 1.0), other.astype(np.float64))


def test_mistaken_pairs_and_lambdas_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 4 log-probabilities"):
        lambda_curve(np.zeros(3), np.zeros(4), Grid((0.0,)))
    with pytest.raises(ValueError, match="at least 1"):
        lambda_curve(np.zeros(0), np.zeros(0), Grid((0.0,)))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        lambda_curve(np.zeros(3), np.zeros(3), Grid((0.5, 1.5)))
    for weight in (1.5, float("nan"), np.array([0.5, -0.5, 0.5])):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            mixed_scores(np.zeros(3), np.zeros(3), weight)
