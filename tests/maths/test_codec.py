"""The int8 codec: distances, energy, and what massive activations do to it."""

import numpy as np
import pytest

from mlpmem_ds.maths import codec
from mlpmem_ds.maths.codec import MASSIVE_LIMIT, clip_massive, find_massive_dimensions, fit_codec
from mlpmem_ds.maths.knn import Exclusion, exact_neighbours
from mlpmem_ds.maths.target_distance import neighbour_variation
from mlpmem_ds.maths.weighting import Weighting, fit_weighting

N, D = 1500, 24


def make_states(seed=0):
    """Clusters in D dimensions, each with values of its own: neighbours matter to the target. (states,
    values)"""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((30, D))
    cluster_N = generator.integers(0, 30, N)
    states_ND = centres[cluster_N] + 0.5 * generator.standard_normal((N, D))
    return states_ND.astype(np.float32), cluster_N * 3 + generator.integers(0, 3, N)


def plant_massive(states_ND, dimension=7, every=50, size=3000.0):
    planted = states_ND.copy()
    planted[::every, dimension] += size
    return planted


def targets_of(vectors, values_N, scale=1.0, temperature=None):
    found = exact_neighbours(vectors, vectors, 100, exclusion=Exclusion(query_ids_Q=np.arange(len(vectors))))
    squared = found.distances_QK.astype(np.float64) * scale**2
    valid = found.ids_QK >= 0
    temperature = temperature or fit_weighting("softmax", squared, valid, 20.0).temperature
    return Weighting(temperature=temperature).weights(squared, valid), values_N[found.ids_QK], temperature


def codes_of(states_ND, fitted):
    clipped = clip_massive(states_ND, fitted.massive)
    return np.clip(np.rint((clipped - fitted.mean_D) @ fitted.rotation_DE / fitted.scale), -127, 127).astype(
        np.int8
    )


def test_ordinary_states_have_no_massive_dimension():
    states_ND, _ = make_states()
    assert find_massive_dimensions(states_ND) == ()
    assert clip_massive(states_ND, ()) is states_ND
    assert find_massive_dimensions(np.zeros((5, 3), np.float32)) == ()


def test_a_planted_dimension_is_found_and_clipped_to_the_stated_limit():
    states_ND = plant_massive(make_states()[0])
    states_ND[:, 3] = 5.0  # never changes: neither massive nor part of what is typical
    (found,) = find_massive_dimensions(states_ND)
    deviations_ND = np.abs(states_ND - np.median(states_ND, axis=0))
    spreads_D = np.sqrt(np.square(deviations_ND).mean(axis=0))
    limit = MASSIVE_LIMIT * np.median(np.delete(spreads_D, 3))
    assert found.dimension == 7 and found.largest == pytest.approx(deviations_ND[:, 7].max())
    assert (found.high - found.low) / 2 == pytest.approx(limit, rel=1e-6)
    clipped_ND = clip_massive(states_ND, (found,))
    np.testing.assert_array_equal(np.delete(clipped_ND, 7, axis=1), np.delete(states_ND, 7, axis=1))
    ordinary = np.arange(N) % 50 > 0
    np.testing.assert_array_equal(clipped_ND[ordinary, 7], states_ND[ordinary, 7])
    np.testing.assert_allclose(clipped_ND[::50, 7], found.high, rtol=1e-6)


def test_a_dimension_that_is_large_everywhere_keeps_its_range():
    states_ND = make_states()[0]
    states_ND[:, 2] *= 300
    (found,) = find_massive_dimensions(states_ND)
    assert found.dimension == 2
    np.testing.assert_array_equal(clip_massive(states_ND, (found,)), states_ND)


def test_clipping_a_massive_dimension_improves_the_targets(monkeypatch):
    states_ND, values_N = make_states()
    states_ND = plant_massive(states_ND)
    *truth, temperature = targets_of(states_ND - states_ND.mean(axis=0), values_N)
    handled = fit_codec(states_ND, D, seed=0)
    monkeypatch.setattr(codec, "find_massive_dimensions", lambda states_ND: ())
    plain = fit_codec(states_ND, D, seed=0)
    assert len(handled.massive) == 1 and not plain.massive and plain.scale > 10 * handled.scale
    ordinary = np.arange(N) % 50 > 0
    found = {
        name: neighbour_variation(
            *truth, *targets_of(codes_of(states_ND, fitted), values_N, fitted.scale, temperature)[:2]
        )
        for name, fitted in (("handled", handled), ("plain", plain))
    }
    assert found["handled"][ordinary].mean() < 0.02 < 0.3 < found["plain"][ordinary].mean()
    assert found["handled"].mean() < found["plain"].mean() / 5


def test_all_dimensions_keep_the_distances_and_fewer_the_leading_energy():
    states_ND, _ = make_states()
    whole = fit_codec(states_ND, D, seed=1)
    rotated = (states_ND - whole.mean_D) @ whole.rotation_DE
    exact = np.square(states_ND[:50, None] - states_ND[None, :50]).sum(-1)
    np.testing.assert_allclose(
        np.square(rotated[:50, None] - rotated[None, :50]).sum(-1), exact, rtol=1e-4, atol=1e-4
    )
    assert whole.energy_kept == pytest.approx(1.0)
    variances = np.linalg.svd(states_ND - states_ND.mean(axis=0, dtype=np.float64), compute_uv=False) ** 2
    part = fit_codec(states_ND, 5, seed=1)
    assert part.energy_kept == pytest.approx(variances[:5].sum() / variances.sum(), rel=1e-6)
    np.testing.assert_allclose(part.rotation_DE.T @ part.rotation_DE, np.eye(5), atol=1e-12)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="all sampled keys are equal"):
        fit_codec(np.ones((10, 4), np.float32), 4, seed=0)
    with pytest.raises(ValueError, match="5 dimensions cannot be taken of 4"):
        fit_codec(np.ones((10, 4), np.float32), 5, seed=0)
