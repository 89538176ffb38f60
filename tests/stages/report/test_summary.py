"""The table, the page and the plots from fixed numbers; choices of λ and temperature against brute force."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mlpmem_ds.formats.evaluation import Sample, Speed
from mlpmem_ds.formats.gates import WeightFigures
from mlpmem_ds.models.mixture import Grid
from mlpmem_ds.stages.report import plots as report_plots
from mlpmem_ds.stages.report import table
from mlpmem_ds.stages.report.breakdowns import KIND, Groups
from mlpmem_ds.stages.report.page import render_report
from mlpmem_ds.stages.report.plots import plot_costs, plot_lambda_curves, plot_speeds, plot_wins
from mlpmem_ds.stages.report.summary import ArmScores, Comparison, GivenWeights, summarize
from mlpmem_ds.stages.report.table import render_table
from mlpmem_ds.stages.report.words import scaled_text

from ..conftest import make_evaluation

SPLITS = {"tuning": 700, "test": 900, "heldout": 650}
LAMBDAS = tuple(round(0.1 * number, 12) for number in range(11))
CHOICES = (
    {"neighbours": 8, "temperature": 1.0},
    {"neighbours": 8, "temperature": 2.0},
    {"neighbours": 2, "temperature": 4.0},
)


def _arm(name, scores, **changes):
    """An arm with these scores; its guesses are its scores, right at every other position."""
    fields = {
        "description": f"what {name} is",
        "guesses": scores,
        "stands_alone": False,
        "parameters": 4_270_000,
        "bytes": 17_100_000,
        "seconds": 12.5,
        "tokens": None,
        "tokens_per_second": 8000.0,
    }
    if changes.get("stands_alone"):
        fields["is_correct"] = {split: np.arange(len(rows)) % 2 == 0 for split, rows in scores.items()}
    return ArmScores(name=name, scores=scores, **(fields | changes))


def _knn(scores, choices=CHOICES, **changes):
    return _arm("base+knn_exact", scores, choices=choices, gives_zeros=True, **changes)


@pytest.fixture(scope="module")
def arms():
    generator = np.random.default_rng(3)
    base = {split: np.log(generator.uniform(0.01, 0.5, size)) for split, size in SPLITS.items()}
    memory = {split: np.log(generator.uniform(0.01, 0.6, size)) for split, size in SPLITS.items()}
    control = {split: scores + generator.normal(0.02, 0.1, len(scores)) for split, scores in base.items()}
    knn = {}
    for split, size in SPLITS.items():
        probabilities = generator.uniform(0.0, 0.7, (size, 3)) * [0.2, 1.0, 0.6]
        probabilities[generator.uniform(size=size) < 0.3] = 0.0
        with np.errstate(divide="ignore"):
            knn[split] = np.log(probabilities).astype(np.float32)
    return [
        _arm("base", base, stands_alone=True, seconds=0.0),
        _knn(knn, seconds=None, bytes=2_300_000_000),
        _arm("base+memory", memory),
        _arm("base_trained_on", control, stands_alone=True),
    ]


COMPARISON = Comparison(
    tuning="tuning",
    tests=("test", "heldout"),
    num_bytes={split: 3 * n for split, n in SPLITS.items()},
    grid=Grid(LAMBDAS),
    bootstrap_samples=200,
    bootstrap_block=50,
    subject="base+memory",
    reference="base+knn_exact",
    controls=("base_trained_on",),
)
ALONE = replace(COMPARISON, subject=None, reference=None, controls=())


def _evaluation(arms, comparison=COMPARISON, groups=(), **changes):
    summary = vars(summarize(arms, comparison, groups))
    fields = {
        "extra_splits": ("heldout",),
        "tokens": SPLITS,
        "lambdas": LAMBDAS,
        "subject": comparison.subject,
        "reference": comparison.reference,
        **{name: value for name, value in summary.items() if name not in ("arms", "scores")},
    }
    return make_evaluation(*summary["arms"], **(fields | changes))


@pytest.fixture(scope="module")
def evaluation(arms):
    return _evaluation(arms)


@pytest.fixture(scope="module")
def whole(arms):
    """With everything that a report may hold: guesses of other tokens, groups, speeds, samples."""
    generator = np.random.default_rng(6)
    base, knn, memory, control = arms
    guesses = {split: np.log(generator.uniform(0.1, 1, size)) for split, size in SPLITS.items()}
    correct = {split: generator.uniform(size=size) < np.exp(guesses[split]) for split, size in SPLITS.items()}
    others = {split: np.log(generator.uniform(0.1, 1, size)) for split, size in SPLITS.items()}
    arms = [
        replace(base, guesses=guesses, is_correct=correct),
        replace(knn, guesses={split: np.full((size, 3), -np.inf) for split, size in SPLITS.items()}),
        replace(memory, guesses=others),
        replace(control, guesses=others, is_correct=correct),
    ]
    groups = [
        Groups(name=KIND, labels=("letters", "none", "digits"), group_of_N=generator.integers(0, 2, 900) * 2)
    ]
    speeds = [Speed(arm="base", keys=None, positions=64, tokens_per_second=812.0)] + [
        Speed(arm="base+knn_exact", keys=keys, positions=64, tokens_per_second=5e5 / keys)
        for keys in (1000, 2000, 4000)
    ]
    samples = [Sample(prompt="once ```upon", base="a time", memory="a midnight")]
    return _evaluation(arms, groups=groups, speeds=tuple(speeds), samples=tuple(samples))


def test_calibration_is_of_the_mixtures_own_probabilities(whole):
    rows = {row.name: row for row in whole.arms}
    assert rows["base"].calibration.error < 0.08  # it was drawn to be calibrated, 900 positions in 14 bins
    assert rows["base_trained_on"].calibration.error > 0.1
    # kNN gives the guess nothing, so the mixture's probability is (1 - λ) of the base's.
    base, knn = (
        [entry.positions * entry.probability for entry in rows[name].calibration.bins]
        for name in ("base", "base+knn_exact")
    )
    assert sum(knn) == pytest.approx((1 - rows["base+knn_exact"].lmbda) * sum(base))
    assert len(rows["base+memory"].calibration.bins) > 1


def test_the_page_shows_breakdowns_speeds_and_samples(whole, evaluation, tmp_path, drawn_pictures):
    text = render_report(whole)
    for needle in ("### By kind of token", "| letters | ", "| none | 0 | – |", "(wins.png)", "(speed.png)",
                   "| base+knn_exact | 500 | 250 | 125 |", "| base | 812 | 812 | 812 |", "a midnight",
                   "````\nonce ```upon\n````"):  # fmt: skip
        assert needle in text, needle
    plain = render_report(evaluation)
    assert "wins.png" not in plain and "speed.png" not in plain and "## Samples" not in plain
    for plot in (plot_wins, plot_speeds):
        plot(whole, tmp_path / "one.png")
        assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def _mixture_perplexity(log_base, log_other, weight):
    mixture = (1 - weight) * np.exp(log_base.astype(np.float64)) + weight * np.exp(
        log_other.astype(np.float64)
    )
    return math.exp(-np.log(mixture).mean()) if (mixture > 0).all() else math.inf


def test_lambda_and_temperature_minimize_the_tuning_split_and_are_reported_on_the_others(arms, evaluation):
    base, knn, memory = arms[:3]
    rows = {row.name: row for row in evaluation.arms}
    for arm, columns in ((knn, 3), (memory, 1)):
        tuning = arm.scores["tuning"].reshape(len(base.scores["tuning"]), columns)
        perplexities = {
            (weight, column): _mixture_perplexity(base.scores["tuning"], tuning[:, column], weight)
            for weight in LAMBDAS
            for column in range(columns)
        }
        weight, column = min(perplexities, key=perplexities.get)
        row = rows[arm.name]
        assert row.lmbda == weight
        assert 0 < weight < 1
        assert row.chosen == (CHOICES[column] if columns > 1 else {})
        for split in SPLITS:
            other = arm.scores[split].reshape(-1, columns)[:, column]
            wanted = _mixture_perplexity(base.scores[split], other, weight)
            base_wanted = _mixture_perplexity(base.scores[split], other, 0.0)
            assert row.splits[split].ppl == pytest.approx(wanted, rel=1e-9)
            assert row.splits[split].ppl_change == pytest.approx(wanted / base_wanted - 1, rel=1e-6)
            assert row.splits[split].win_rate == pytest.approx((other > base.scores[split]).mean())
        assert row.ppl == row.splits["test"].ppl


def test_the_choice_does_not_look_at_the_test_splits(arms, evaluation):
    shuffled = [
        _arm(
            arm.name,
            {
                split: scores if split == "tuning" else scores[::-1] - (0 if arm.stands_alone else 1)
                for split, scores in arm.scores.items()
            },
            stands_alone=arm.stands_alone,
            choices=arm.choices,
        )
        for arm in arms
    ]
    again = summarize(shuffled, COMPARISON)
    for before, after in zip(evaluation.arms, again.arms, strict=True):
        assert (before.lmbda, before.chosen) == (after.lmbda, after.chosen)
        assert before.splits["tuning"] == after.splits["tuning"]


def test_knn_alone_is_never_chosen_even_where_the_tuning_split_likes_it_best(arms):
    base = arms[0]
    sure = {split: np.full((size, 1), -1e-6, np.float32) for split, size in SPLITS.items()}
    sure["test"][5] = -np.inf
    row = summarize([base, _knn(sure, choices=CHOICES[:1])], ALONE).arms[1]
    assert row.lmbda == LAMBDAS[-2]
    assert math.isfinite(row.ppl)
    memory = {split: scores[:, 0] for split, scores in sure.items()} | {"test": np.full(SPLITS["test"], -0.1)}
    assert summarize([base, _arm("base+memory", memory)], ALONE).arms[1].lmbda == 1.0


def test_shares_wins_and_paired_changes(evaluation):
    ppl = {row.name: row.ppl for row in evaluation.arms}
    share = (ppl["base"] - ppl["base+memory"]) / (ppl["base"] - ppl["base+knn_exact"])
    assert evaluation.recovered_share == pytest.approx(share)
    assert evaluation.wins == {"base_trained_on": ppl["base+memory"] < ppl["base_trained_on"]}
    assert set(evaluation.against) == {"base", "base+knn_exact", "base_trained_on"}
    for name, numbers in evaluation.against.items():
        assert numbers.ppl_change == pytest.approx(ppl["base+memory"] / ppl[name] - 1)
        low, high = numbers.ppl_interval
        assert low < numbers.ppl_change < high


def test_an_interval_over_documents_where_there_are_enough(arms):
    starts = {"tuning": np.arange(0, 700, 100), "test": np.arange(0, 900, 30)}
    summary = summarize(arms, replace(COMPARISON, document_starts=starts))
    memory = {arm.name: arm for arm in summary.arms}["base+memory"]
    assert memory.splits["tuning"].document_interval is None  # 7 documents
    low, high = memory.splits["test"].document_interval
    assert low < memory.ppl_change < high
    by_blocks = replace(COMPARISON, bootstrap_block=30)
    same = {arm.name: arm for arm in summarize(arms, by_blocks).arms}["base+memory"]
    assert (low, high) == same.ppl_interval
    against = summary.against["base_trained_on"]
    assert against.document_interval[0] < against.ppl_change < against.document_interval[1]


def test_given_weights_are_those_of_each_position(arms):
    base, memory = arms[0], arms[2]
    generator = np.random.default_rng(5)
    lambdas = {split: generator.uniform(size=size) for split, size in SPLITS.items()}
    figures = {split: WeightFigures(means=(0.5,), mean=0.5, quantiles=(0.1,) * 5) for split in SPLITS}
    given = GivenWeights(lambdas=lambdas, figures=figures, chosen={})
    gated = replace(memory, name="base+memory+gate", weights=given)
    found = {arm.name: arm for arm in summarize([*arms, gated], COMPARISON).arms}["base+memory+gate"]
    for split, weight in lambdas.items():
        p = (1 - weight) * np.exp(base.scores[split]) + weight * np.exp(memory.scores[split])
        assert found.splits[split].ppl == pytest.approx(np.exp(-np.log(p).mean()))
    assert found.lmbda is None and found.weights == figures and found.tuning_curve is None
    assert (
        found.win_rate == {arm.name: arm for arm in summarize(arms, COMPARISON).arms}["base+memory"].win_rate
    )


def test_fixed_weights_of_a_bank_that_are_all_there_is_are_a_share_of_1(arms):
    chosen = dict(zip("abcd", (0.036792, 0.71023, 0.07393, 0.179048), strict=True))
    assert sum(chosen.values()) > 1  # as floats are added
    lambdas = {split: np.ones(size) for split, size in SPLITS.items()}
    given = GivenWeights(lambdas=lambdas, figures={}, chosen=chosen)
    bank = replace(arms[2], name="base+memories", weights=given)
    found = {arm.name: arm for arm in summarize([*arms, bank], COMPARISON).arms}["base+memories"]
    assert (found.lmbda, found.chosen) == (1.0, chosen)


def test_without_a_memory_or_a_gain_there_is_no_share(arms):
    alone = summarize(arms[:2], replace(ALONE, reference="base+knn_exact"))
    assert alone.recovered_share is None
    assert alone.wins == {} and alone.against == {}
    useless = {split: np.full((size, 1), -np.inf, np.float32) for split, size in SPLITS.items()}
    summary = summarize(
        [arms[0], _knn(useless, choices=CHOICES[:1]), arms[2]], replace(COMPARISON, controls=())
    )
    assert summary.recovered_share is None
    assert summary.arms[1].lmbda == 0.0
    assert summary.arms[1].ppl == summary.arms[0].ppl


def test_bits_per_byte_counts_all_positions_over_the_bytes_of_the_text(arms, evaluation):
    wanted = -arms[0].scores["test"].sum() / math.log(2) / COMPARISON.num_bytes["test"]
    assert evaluation.arms[0].bits_per_byte == pytest.approx(wanted)


def test_table_has_a_line_an_arm_and_its_numbers(evaluation):
    lines = render_table(evaluation).splitlines()
    assert len(lines) == 3 + len(evaluation.arms)
    assert f"{evaluation.recovered_share:.0%}" in lines[-1]
    for line, arm in zip(lines[2:-1], evaluation.arms, strict=True):
        assert line.startswith(arm.name + " ")
        assert f"{arm.ppl:.2f}" in line and f"{arm.splits['heldout'].ppl:.2f}" in line
    knn = lines[3]
    assert "2.3 GB" in knn and "4.27 M" in knn and "8,000" in knn
    assert "heldout ppl" in lines[0]


def test_report_says_what_a_reader_must_know(evaluation):
    text = render_report(evaluation)
    memory = next(arm for arm in evaluation.arms if arm.name == "base+memory")
    for needle in (
        f"**{memory.ppl:.2f} with the memory",
        "## What is equal, and what is not",
        "## How λ was chosen",
        "## Second test set: heldout",
        "| base_trained_on |",
        "was chosen on the tuning split (700 tokens)",
        "against `base_trained_on`",
        f"{100 * evaluation.recovered_share:.0f} % of what an exact search",
        "(lambda.png)",
        "(cost.png)",
        "(of 2, 8",
        *(f"- `{arm.name}`: what {arm.name} is." for arm in evaluation.arms),
        *(f"- **{column.title}**: " for column in table.columns(evaluation)),
        "What the controls are for",
        "## Limits",
    ):
        assert needle in text, needle
    assert "None" not in text and "nan" not in text
    assert "IVF-PQ" not in text
    lines = [line for line in text.splitlines() if line.startswith("| base")]
    assert all(line.count("|") == lines[0].count("|") for line in lines[: len(evaluation.arms)])


def test_a_memory_that_loses_is_reported_as_losing(arms):
    worse = _arm("base+memory", arms[2].scores)
    better = _arm(
        "base_trained_on",
        {split: scores + 1.0 for split, scores in arms[0].scores.items()},
        guesses=arms[0].scores,
        stands_alone=True,
    )
    evaluation = _evaluation([arms[0], worse, better], replace(COMPARISON, reference=None))
    assert evaluation.wins == {"base_trained_on": False}
    text = render_report(evaluation)
    line = next(line for line in text.splitlines() if line.startswith("- against `base_trained_on`"))
    assert "worse" in line and "+" in line


def test_plots_are_png_and_the_same_from_the_same_numbers(evaluation, tmp_path, drawn_pictures):
    for plot in (plot_lambda_curves, plot_costs):
        plot(evaluation, tmp_path / "one.png")
        plot(evaluation, tmp_path / "two.png")
        content = (tmp_path / "one.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
        assert content == (tmp_path / "two.png").read_bytes()


def test_an_arm_that_is_far_worse_does_not_stretch_the_plots(arms, monkeypatch, tmp_path):
    groups = Groups(name=KIND, labels=("letters", "none", "digits"), group_of_N=np.arange(900) % 2 * 2)
    hopeless = _arm(
        "hopeless", {split: scores - 4.0 for split, scores in arms[0].scores.items()}, stands_alone=True
    )
    figures = []
    monkeypatch.setattr(report_plots, "_save", lambda figure, path: figures.append(figure))
    evaluation = _evaluation([*arms, hopeless], groups=[groups])
    plot_lambda_curves(evaluation, tmp_path / "lambda.png")
    plot_wins(evaluation, tmp_path / "wins.png")
    base_ppl = evaluation.arms[0].splits["tuning"].ppl
    low, high = figures[0].axes[0].get_ylim()
    assert (
        0 < low < min(arm.splits["tuning"].ppl for arm in evaluation.arms) and base_ppl < high < 2 * base_ppl
    )
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert [label for label in labels if "above" in label] == [
        f"hopeless: {base_ppl * math.exp(4):,.4g}, above"
    ]
    (kinds,) = evaluation.breakdowns
    others = [numbers for name, numbers in kinds.arms.items() if name != "hopeless"]
    most = 1000 * max(max(numbers.won) for numbers in others)
    assert (
        most
        < figures[1].axes[0].get_xlim()[1]
        < 1.2 * most + 1200 * max(-min(numbers.lost) for numbers in others)
    )
    assert figures[1].axes[0].get_xlim()[0] > 1000 * min(kinds.arms["hopeless"].lost)
    labels = [text.get_text() for text in figures[1].axes[0].get_legend().get_texts()]
    assert "hopeless (cut off)" in labels and sum("cut off" in label for label in labels) == 1


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (999, "B", "999 B"),
        (4_270_000, "", "4.27 M"),
        (0, "", "0"),
        (2_345_000_000, "B", "2.35 GB"),
        (40e12, "B", "40 TB"),
    ],
)
def test_scaled_numbers(value, unit, text):
    assert scaled_text(value, unit) == text
