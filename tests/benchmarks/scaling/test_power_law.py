"""Power laws of known exponents are found again, with and without a floor."""

import numpy as np
import pytest

from mlpmem_ds.benchmarks.scaling.power_law import PowerLaw, exponent_interval, fit_power_law

X_P = np.array([1e6, 3e6, 1e7, 3e7, 1e8])


@pytest.mark.parametrize("exponent", [0.05, 0.076, 0.3])
def test_an_exact_power_law_is_found(exponent):
    law = fit_power_law(X_P[:3], 12 * X_P[:3] ** -exponent)
    assert (law.scale, law.exponent, law.floor) == pytest.approx((12, exponent, 0))


@pytest.mark.parametrize(("exponent", "floor"), [(0.3, 1.7), (0.5, 1.4)])
def test_a_floor_is_found_too(exponent, floor):
    truth = PowerLaw(scale=2.0 * 1e6**exponent, exponent=exponent, floor=floor)
    law = fit_power_law(X_P, truth(X_P), has_floor=True)
    assert law.exponent == pytest.approx(exponent, rel=0.03)
    assert law.floor == pytest.approx(floor, rel=0.01)
    assert law(X_P) == pytest.approx(truth(X_P), rel=1e-3)


def test_the_interval_of_noisy_losses_holds_the_exponent():
    generator = np.random.default_rng(4)
    truth = 12 * X_P**-0.08
    losses_RP = truth * np.exp(generator.normal(0, 0.01, (300, len(X_P))))
    low, high = exponent_interval(X_P, losses_RP)
    assert low < 0.08 < high and high - low < 0.02


@pytest.mark.parametrize(
    ("sizes", "has_floor", "said"),
    [(2, False, "2 sizes; a power law needs 3"), (3, True, "3 sizes; a power law needs 4")],
)
def test_too_few_sizes_are_refused(sizes, has_floor, said):
    with pytest.raises(ValueError, match=said):
        fit_power_law(X_P[:sizes], X_P[:sizes] ** -0.1, has_floor=has_floor)
