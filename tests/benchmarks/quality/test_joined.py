"""Results of several seeds, joined: what one run with all of them gives, and what cannot be joined."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.benchmarks.quality.bootstrap import ArmSums
from mlpmem_ds.benchmarks.quality.figures import change_of
from mlpmem_ds.benchmarks.quality.joined import join_results, read_others
from mlpmem_ds.benchmarks.quality.ratios import ratios_of
from mlpmem_ds.benchmarks.quality.results import ArmRow, QualityResult, write_result
from mlpmem_ds.core.errors import UserError

from .conftest import make_result, make_row

TINY = {"preset": "tiny"}
ARMS = ("base", "base+knn_exact", "base+memory")
DRAW = np.random.default_rng(3)
POSITIONS_M = DRAW.integers(50, 200, size=12)
SUMS = {
    arm: [-nats * POSITIONS_M + DRAW.normal(0, 5, size=12) for _ in range(seeds)]
    for arm, nats, seeds in zip(ARMS, (3.0, 2.9, 2.8), (1, 1, 3), strict=True)
}


def _sums(seeds: slice) -> ArmSums:
    return ArmSums(
        positions_M=POSITIONS_M,
        sums={arm: sums[seeds] if len(sums) > 1 else sums for arm, sums in SUMS.items()},
    )


def _row(arm: str, tested: ArmSums) -> ArmRow:
    ppl = tuple(tested.ppl(arm, seed) for seed in range(len(tested.sums[arm])))
    change = None if arm == "base" else change_of(arm, tested)
    return make_row(
        arm,
        float(np.exp(np.mean(np.log(ppl)))),
        ppl_by_seed=ppl,
        seeds=len(ppl),
        change=None if change is None else change.value,
        interval=None if change is None else change.interval,
        lambdas=(0.25,) * len(ppl) if arm == "base+memory" else (),
    )


def _result(seeds: slice) -> QualityResult:
    tested = _sums(seeds)
    (text,) = make_result().texts
    return make_result(
        seeds=tuple(range(3)[seeds]),
        texts=(replace(text, rows=tuple(_row(arm, tested) for arm in ARMS)),),
        ratios=tuple(ratios_of(tested, None, "domain")),
        job_seconds={f"domain/memory-{seed}": 1.0 + seed for seed in range(3)[seeds]} | {"base": 7.0},
    )


def _close(row: ArmRow) -> dict[str, object]:
    return {
        name: pytest.approx(value) if isinstance(value, (float, tuple)) and value != () else value
        for name, value in vars(row).items()
    }


def test_seeds_of_three_runs_make_what_one_run_with_all_of_them_makes() -> None:
    joined = join_results([_result(slice(2, 3)), _result(slice(0, 2))])
    whole = _result(slice(0, 3))
    assert joined.seeds == whole.seeds == (0, 1, 2)
    for row, expected in zip(joined.texts[0].rows, whole.texts[0].rows, strict=True):
        assert vars(row) == _close(expected)
    for ratio, expected in zip(joined.ratios, whole.ratios, strict=True):
        assert vars(ratio) == {**vars(expected), "value": pytest.approx(expected.value)}
    assert joined.job_seconds == whole.job_seconds


def test_a_ratio_without_a_value_with_one_seed_has_none_in_all() -> None:
    whole, part = _result(slice(0, 2)), _result(slice(2, 3))
    without = replace(
        part.ratios[0], value=None, interval=None, by_seed=(None,), is_met=False, is_clear=False
    )
    joined = join_results([whole, replace(part, ratios=(without, *part.ratios[1:]))]).ratios[0]
    assert joined.value is None and joined.interval is None and not joined.is_clear
    assert joined.by_seed == (*whole.ratios[0].by_seed, None)


def test_tokens_and_seconds_are_means_over_the_seeds_that_have_them() -> None:
    results = [_result(slice(0, 2)), _result(slice(2, 3))]
    changes = (
        {"tokens": 300, "seconds": 60.0, "epochs_used_up": (2.0,)},
        {"tokens": 600, "seconds": 90.0, "epochs_used_up": (2.0,)},
    )
    for number, (result, changed) in enumerate(zip(results, changes, strict=True)):
        (text,) = result.texts
        rows = (*text.rows[:2], replace(text.rows[2], **changed))
        results[number] = replace(result, texts=(replace(text, rows=rows),))
    row = join_results(results).texts[0].rows[2]
    assert (row.tokens, row.seconds, row.epochs_used_up) == (400, pytest.approx(70), (2.0, 2.0))
    (text,) = results[1].texts
    without = replace(text.rows[2], tokens=None, seconds=None, epochs_used_up=None)
    results[1] = replace(results[1], texts=(replace(text, rows=(*text.rows[:2], without)),))
    row = join_results(results).texts[0].rows[2]
    assert (row.tokens, row.seconds, row.epochs_used_up) == (300, pytest.approx(60), None)


def test_one_result_is_itself() -> None:
    assert join_results([_result(slice(0, 1))]) == _result(slice(0, 1))


def test_other_bases_texts_arms_and_flags_are_not_joined() -> None:
    one, two = _result(slice(0, 2)), _result(slice(2, 3))
    (text,) = two.texts
    other_base = replace(text.rows[0], ppl=text.rows[0].ppl * 1.01)
    for changed, message in (
        (replace(two, texts=(replace(text, rows=(other_base, *text.rows[1:])),)), "these are two bases"),
        (replace(two, texts=(replace(text, documents=13),)), "the texts differ"),
        (replace(two, texts=(replace(text, rows=text.rows[:2]),)), "the arms differ"),
        (replace(two, settings={"preset": "tiny", "ds_config": "own.json"}), "the flags differ"),
    ):
        with pytest.raises(UserError, match=message):
            join_results([one, changed])


def test_files_that_do_not_fit_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    with pytest.raises(UserError, match="no such file; it takes the quality.json of another run"):
        read_others([path], TINY, [1])
    write_result(path, _result(slice(0, 1)))
    assert [one.seeds for one in read_others([path], TINY, [1, 2])] == [(0,)]
    with pytest.raises(UserError, match=r"has seed 0, as this run has: choose others with --first-seed"):
        read_others([path], TINY, [0])
    with pytest.raises(UserError, match=f"has seed 0, as {re.escape(str(path))} has"):
        read_others([path, path], TINY, [1])
    with pytest.raises(UserError, match="is of --preset tiny, this run of --preset small: leave it out"):
        read_others([path], {"preset": "small"}, [1])
