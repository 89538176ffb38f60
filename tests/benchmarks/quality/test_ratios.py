"""The ratios from made-up perplexities, computed by hand."""

import numpy as np
import pytest

from mlpmem_ds.benchmarks.quality.bootstrap import ArmSums
from mlpmem_ds.benchmarks.quality.ratios import RATIOS, ratios_of

PPL = {
    "base": 20.0,
    "base+knn_exact": 18.0,
    "base+memory": 17.0,
    "base+memory_ce": 17.3,
    "base+paper": 17.2,
    "base+paper_ce": 17.6,
    "base+memory+gate": 16.8,
    "base+bank+gate": 16.9,
    "base+ensemble+gate": 15.5,
    "continued": 16.0,
}
OTHER = {"base": 40.0, "base+memory": 44.0, "base+memory+gate": 39.9, "base+ensemble+gate": 40.1}
BY_HAND = {
    "recovered_share": 3 / 2,
    "memory_gain_over_ce_only_gain": 2.8 / 2.4,
    "default_recipe_gain_over_ce_only_gain": 3 / 2.7,
    "gate_ppl_over_best_fixed": 16.8 / 17,
    "gate_share_of_new_domain_gain": 3.2 / 3,
    "gate_out_of_domain_ppl_over_base": 39.9 / 40,
    "memory_ppl_over_continued_training": 16.8 / 16,
    "memory_ppl_over_gated_ensemble": 16.8 / 15.5,
    "memory_out_of_domain_ppl_over_gated_ensemble": 39.9 / 40.1,
    "bank_share_of_own_gain": 3.1 / 3.2,
}
NOT_MET = {"memory_ppl_over_continued_training", "memory_ppl_over_gated_ensemble"}
MET = {name: name not in NOT_MET for name in BY_HAND}


def _tested(ppl):
    """Arms that have the same perplexity in each of three documents."""
    positions_M = np.array([100, 50, 80])
    return ArmSums(
        positions_M=positions_M, sums={arm: [-np.log(value) * positions_M] for arm, value in ppl.items()}
    )


def test_each_ratio_is_what_it_is_by_hand():
    found = {ratio.name: ratio for ratio in ratios_of(_tested(PPL), _tested(OTHER), "domain")}
    assert {name: ratio.value for name, ratio in found.items()} == pytest.approx(BY_HAND)
    assert {name: ratio.is_met for name, ratio in found.items()} == MET
    assert all(ratio.text == "domain" and ratio.is_clear for ratio in found.values())


def test_the_names_are_those_that_are_promised():
    assert {ratio.name for ratio in RATIOS} == set(BY_HAND)


def test_a_ratio_of_an_arm_that_is_missing_is_left_out():
    few = {arm: PPL[arm] for arm in ("base", "base+memory", "base+knn_exact")}
    assert [ratio.name for ratio in ratios_of(_tested(few), None, "general")] == ["recovered_share"]


def test_a_ratio_whose_interval_has_both_is_not_clear():
    positions_M = np.array([100, 100])
    nats = {"base": (2.0, 2.0), "base+memory": (1.0, 1.9), "base+knn_exact": (1.8, 1.2)}
    tested = ArmSums(
        positions_M=positions_M,
        sums={arm: [-np.array(value) * positions_M] for arm, value in nats.items()},
    )
    (ratio,) = ratios_of(tested, None, "domain")
    assert not ratio.is_clear and ratio.interval[0] < 1 < ratio.interval[1]


def test_a_share_of_nothing_has_no_value_and_is_not_met():
    positions_M = np.array([100, 50, 80])
    sums = {arm: [-np.log(PPL[arm]) * positions_M] for arm in ("base", "base+paper")}
    no_gain = [-np.log(value) * positions_M for value in (PPL["base"], PPL["base+paper_ce"])]
    tested = ArmSums(positions_M=positions_M, sums=sums | {"base+paper_ce": no_gain})
    (ratio,) = ratios_of(tested, None, "domain")
    assert (ratio.value, ratio.interval, ratio.is_met, ratio.is_clear) == (None, None, False, False)
    assert ratio.by_seed == (None, pytest.approx(2.8 / 2.4))


def test_an_interval_of_which_many_draws_have_no_value_is_not_clear():
    positions_M = np.array([100, 100, 100])
    nats = {"base": (3.0, 3.0, 3.0), "base+memory": (1.0, 1.0, 1.0), "base+knn_exact": (1.5, 2.9, 3.05)}
    tested = ArmSums(
        positions_M=positions_M,
        sums={arm: [-np.array(value) * positions_M] for arm, value in nats.items()},
    )
    (ratio,) = ratios_of(tested, None, "domain")
    assert ratio.is_met and ratio.interval[0] > 1 and not ratio.is_clear  # 1 draw of 27 has no gain of kNN
