"""Where arms win and lose, and calibration, against plain loops over the positions."""

import math

import numpy as np
import pytest

from mlpmem_ds.stages.report.breakdowns import (
    Groups,
    breakdown,
    calibration,
    entropy_groups,
    frequency_groups,
)

N = 500


@pytest.fixture(scope="module")
def logs():
    generator = np.random.default_rng(2)
    base = np.log(generator.uniform(0.01, 0.9, N)).astype(np.float32)
    arm = np.log(generator.uniform(0.01, 0.9, N))
    arm[:20] = base[:20]
    return base, arm


def test_each_groups_numbers_and_their_sum(logs):
    base, arm = logs
    groups = Groups(
        name="thirds", labels=("a", "b", "empty", "c"), group_of_N=np.array([0, 1, 3, 3])[np.arange(N) % 4]
    )
    found = breakdown(groups, base, {"arm": arm})
    assert found.positions == (125, 125, 0, 250) and found.labels == ("a", "b", "empty", "c")
    numbers = found.arms["arm"]
    for group in (0, 1, 3):
        mine = [n for n in range(N) if groups.group_of_N[n] == group]
        gains = [float(arm[n]) - float(base[n]) for n in mine]
        base_ppl = math.exp(-sum(float(base[n]) for n in mine) / len(mine))
        arm_ppl = math.exp(-sum(arm[n] for n in mine) / len(mine))
        assert found.base_ppl[group] == pytest.approx(base_ppl)
        assert numbers.ppl[group] == pytest.approx(arm_ppl)
        assert numbers.ppl_change[group] == pytest.approx(arm_ppl / base_ppl - 1)
        wins = sum(1.0 if gain > 0 else 0.5 if gain == 0 else 0.0 for gain in gains)
        assert numbers.win_rate[group] == pytest.approx(wins / len(mine))
        assert numbers.won[group] == pytest.approx(sum(gain for gain in gains if gain > 0) / N)
        assert numbers.lost[group] == pytest.approx(sum(gain for gain in gains if gain < 0) / N)
    assert numbers.ppl[2] is numbers.ppl_change[2] is numbers.win_rate[2] is found.base_ppl[2] is None
    assert sum(numbers.won) + sum(numbers.lost) == pytest.approx(float((arm - base).mean()))


def test_edges_belong_to_the_upper_group():
    entropies = entropy_groups(np.array([0.0, 0.49, 0.5, 1.0, 5.9, 6.0, 11.0]))
    assert [entropies.labels[group] for group in entropies.group_of_N] == [
        "below 0.5",
        "below 0.5",
        "0.5 to 1",
        "1 to 2",
        "4 to 6",
        "6 and more",
        "6 and more",
    ]
    counts = np.array([0, 1, 9, 10, 99, 100, 9_999, 10_000, 5_000_000])
    values = np.array([8, 0, 1, 2, 3, 4, 5, 6, 7])
    frequencies = frequency_groups(counts, values)
    assert [frequencies.labels[group] for group in frequencies.group_of_N] == [
        "10,000 and more",
        "never",
        "1 to 9",
        "1 to 9",
        "10 to 99",
        "10 to 99",
        "100 to 999",
        "1,000 to 9,999",
        "10,000 and more",
    ]


def test_calibration_of_probabilities_that_are_too_sure():
    generator = np.random.default_rng(4)
    probabilities = generator.uniform(0.2, 1.0, 40_000)
    right = generator.uniform(size=40_000) < probabilities
    assert calibration(np.log(probabilities), right).error < 0.01
    found = calibration(np.log(probabilities) / 3, right)
    assert found.error == pytest.approx((probabilities ** (1 / 3) - probabilities).mean(), abs=0.01)
    assert sum(entry.positions for entry in found.bins) == 40_000
    assert all(0 <= entry.correct <= 1 and entry.positions > 0 for entry in found.bins)
