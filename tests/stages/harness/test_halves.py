"""λ is chosen on questions that are not reported."""

from __future__ import annotations

from mlpmem_ds.stages.harness.halves import split_halves


def test_halves_are_disjoint_and_all_is_asked() -> None:
    prompts = [f"question {number}" for number in range(31)]
    halves = split_halves(prompts, None)
    assert not {*halves.tuning} & {*halves.reported}
    assert halves.asked == tuple(range(31)) and len(halves.reported) == 16


def test_a_group_stands_in_one_half() -> None:
    prompts = [f"question {number % 7}" for number in range(40)]
    halves = split_halves(prompts, 35)
    texts = [{prompts[number] for number in half} for half in (halves.tuning, halves.reported)]
    assert not texts[0] & texts[1] and len(halves.asked) == 35


def test_a_limit_draws_and_does_not_take_the_first() -> None:
    prompts = [f"question {number}" for number in range(400)]
    halves = split_halves(prompts, 40)
    assert len(halves.tuning) == len(halves.reported) == 20
    assert 8 <= sum(number < 200 for number in halves.asked) <= 32
    larger = split_halves(prompts, 80)
    assert {*halves.asked} < {*larger.asked}
    assert {*halves.reported} <= {*larger.reported}


def test_a_prompt_may_hold_half_of_a_surrogate_pair() -> None:
    assert split_halves(["\ud800"], None).reported == (0,)
