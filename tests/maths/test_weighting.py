"""Weights of neighbours against plain loops in float64."""

import math

import numpy as np
import pytest

from mlpmem_ds.maths import weighting
from mlpmem_ds.maths.weighting import Weighting, fit_weighting, weight_perplexity

KERNELS = {
    "softmax": lambda excess, temperature: math.exp(-excess / temperature),
    "inverse-distance": lambda excess, temperature: 1 / (1 + excess / temperature),
}


def make_rows(num_rows=29, k=17, vocabulary=7, seed=0):
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.integers(1000, 1200, (num_rows, k)), axis=1).astype(np.float64)
    counts = rng.integers(0, k + 1, num_rows)
    counts[:3] = [0, 1, k]
    valid = np.arange(k)[None] < counts[:, None]
    return (
        np.where(valid, distances, np.finfo(np.float64).max),
        np.where(valid, rng.integers(0, vocabulary, (num_rows, k)), -1),
        valid,
    )


def test_weights_are_stable_for_distances_far_beyond_the_temperature():
    weights = Weighting(temperature=1.0).weights(np.array([[1e9, 1e9 + 1, 5e9]]), np.ones((1, 3), bool))
    np.testing.assert_allclose(
        weights, [[1 / (1 + np.exp(-1)), np.exp(-1) / (1 + np.exp(-1)), 0]], rtol=1e-14
    )


@pytest.mark.parametrize("kind", KERNELS)
def test_weights_equal_the_formula_of_their_kind(kind):
    """In plain loops; missing neighbours have none, and a row without neighbours is all zero."""
    distances, _, valid = make_rows()
    of_kind = Weighting(kind=kind, temperature=25.0)
    found = of_kind.weights(distances, valid)
    assert found.dtype == np.float64 and (found[0] == 0).all() and (found[~valid] == 0).all()
    for row in range(1, len(distances)):
        present = distances[row][valid[row]].tolist()
        kernel = [KERNELS[kind](distance - min(present), 25.0) for distance in present]
        expected = [weight / sum(kernel) for weight in kernel]
        np.testing.assert_allclose(found[row][valid[row]], expected, rtol=1e-13)
    hotter = of_kind.scaled(4.0)
    assert hotter == Weighting(kind=kind, temperature=100.0)
    assert (weight_perplexity(hotter.weights(distances, valid)[2:]) >= weight_perplexity(found[2:])).all()


def test_inverse_distances_leave_far_neighbours_more():
    distances, _, valid = make_rows(num_rows=200, k=40)
    weights = {
        kind: fit_weighting(kind, distances, valid, 6.0).weights(distances, valid)[2] for kind in KERNELS
    }
    assert weights["inverse-distance"][-1] > 10 * weights["softmax"][-1]


def test_perplexity_of_known_weights():
    weights = np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(weight_perplexity(weights), [4, 1, 2, 1], rtol=1e-15)


@pytest.mark.parametrize("perplexity", [1.5, 4.0, 6.0])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("kind", KERNELS)
def test_fitted_temperature_gives_the_perplexity(kind, perplexity, scale):
    distances, _, valid = make_rows(num_rows=200)
    distances[valid] = (distances[valid] + np.random.default_rng(1).random(int(valid.sum()))) * scale
    fitted = fit_weighting(kind, distances, valid, perplexity)
    has_neighbour = valid.any(1)
    weights = fitted.weights(distances, valid)[has_neighbour]
    assert np.exp(np.log(weight_perplexity(weights)).mean()) == pytest.approx(perplexity, rel=1e-6)
    assert fitted == fit_weighting(kind, distances, valid, perplexity)


@pytest.mark.parametrize("kind", KERNELS)
def test_a_fit_of_some_rows_at_a_time_has_the_bits_of_one_of_all(monkeypatch, kind):
    distances, _, valid = make_rows(num_rows=200)
    fits = set()
    for weights_at_once in (1, 100, 10**6):
        monkeypatch.setattr(weighting, "_WEIGHTS_AT_ONCE", weights_at_once)
        fits.add(fit_weighting(kind, distances, valid, 4.0).temperature)
    monkeypatch.setattr(weighting, "_BISECTIONS", 100)  # none of which finds a number between the last two
    assert {fit_weighting(kind, distances, valid, 4.0).temperature} == fits


def test_a_perplexity_out_of_reach_is_refused():
    distances = np.tile(np.arange(8.0), (3, 1))
    valid = np.ones((3, 8), bool)
    for perplexity in (8.0, 9.0, 1.0, 0.5, float("nan")):
        with pytest.raises(ValueError, match="cannot be reached.*all of them 8"):
            fit_weighting("softmax", distances, valid, perplexity)
    with pytest.raises(ValueError, match="the nearest neighbours alone give 8"):
        fit_weighting("softmax", np.ones((3, 8)), valid, 4.0)
    with pytest.raises(ValueError, match="no row has a neighbour"):
        fit_weighting("softmax", distances, ~valid, 4.0)
    with pytest.raises(ValueError, match="temperature is 0"):
        Weighting(temperature=0)
