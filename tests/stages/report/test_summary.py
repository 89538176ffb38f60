"""The table, the page and the plots from fixed numbers; choices of λ and temperature against brute force."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mlpmem_ds.stages.report import plots as report_plots
from mlpmem_ds.stages.report.breakdowns import KIND, Groups
from mlpmem_ds.stages.report.page import render_report, render_table
from mlpmem_ds.stages.report.plots import plot_costs, plot_lambda_curves, plot_speeds, plot_wins
from mlpmem_ds.stages.report.summary import Arm, Protocol, summarize
from mlpmem_ds.stages.report.words import scaled_text

SPLITS = {"tuning": 700, "test": 900, "heldout": 650}
LAMBDAS = tuple(round(0.1 * number, 12) for number in range(11))


def _arm(name, scores, **changes):
    fields = {
        "alone": False,
        "parameters": 4_270_000,
        "bytes": 17_100_000,
        "seconds": 12.5,
        "tokens_per_second": 8000.0,
    }
    return Arm(name=name, scores=scores, **(fields | changes))


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
        _arm("base", base, alone=True, seconds=0.0),
        _arm(
            "base+knn_exact",
            knn,
            temperatures=(1.0, 2.0, 4.0),
            neighbours=(8, 8, 2),
            seconds=None,
            bytes=2_300_000_000,
        ),
        _arm("base+memory", memory),
        _arm("base_trained_on", control, alone=True, tokens_per_second=None),
    ]


PROTOCOL = Protocol(
    tuning="tuning",
    tests=("test", "heldout"),
    num_bytes={split: 3 * n for split, n in SPLITS.items()},
    lambdas=LAMBDAS,
    bootstrap_samples=200,
    bootstrap_block=50,
)


@pytest.fixture(scope="module")
def evaluation(arms):
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cores": 2, "platform": "Linux"},
        "tuning_split": "tuning",
        "test_split": "test",
        "extra_splits": ["heldout"],
        "tokens": SPLITS,
        "lambdas": list(LAMBDAS),
        "settings": {
            "k": 8,
            "temperature": 2.0,
            "temperature_factors": [0.5, 1.0, 2.0],
            "neighbour_divisors": [1, 4],
            "nprobe": None,
            "index_factory": None,
            "bootstrap_samples": 200,
            "bootstrap_block": 50,
            "block_size": 256,
            "stride": 128,
            "dtype": "float32",
            "device": "cpu",
            "threads": 2,
        },
        **summarize(arms, PROTOCOL),
    }


@pytest.fixture(scope="module")
def whole(arms, evaluation):
    """With everything that a report may hold: guesses, groups, speeds, samples."""
    generator = np.random.default_rng(6)
    base, knn, memory, control = arms
    guesses = {split: np.log(generator.uniform(0.1, 1, size)) for split, size in SPLITS.items()}
    came = {split: generator.uniform(size=size) < np.exp(guesses[split]) for split, size in SPLITS.items()}
    others = {split: np.log(generator.uniform(0.1, 1, size)) for split, size in SPLITS.items()}
    arms = [
        replace(base, guesses=guesses, came=came),
        replace(knn, guesses={split: np.full((size, 3), -np.inf) for split, size in SPLITS.items()}),
        replace(memory, guesses=others),
        replace(control, guesses=others, came=came),
    ]
    groups = [Groups(name=KIND, labels=("letters", "none", "digits"), of_N=generator.integers(0, 2, 900) * 2)]
    speeds = [{"arm": "base", "keys": None, "positions": 64, "tokens_per_second": 812.0}] + [
        {"arm": "base+knn_exact", "keys": keys, "positions": 64, "tokens_per_second": 5e5 / keys}
        for keys in (1000, 2000, 4000)
    ]
    samples = [{"prompt": "once ```upon", "base": "a time", "memory": "a midnight"}]
    return {**evaluation, **summarize(arms, PROTOCOL, groups), "speeds": speeds, "samples": samples}


def test_calibration_is_of_the_mixtures_own_probabilities(whole):
    rows = {row["name"]: row for row in whole["arms"]}
    assert (
        rows["base"]["calibration"]["error"] < 0.08
    )  # it was drawn to be calibrated, 900 positions in 14 bins
    assert rows["base_trained_on"]["calibration"]["error"] > 0.1
    # kNN gives the guess nothing, so the mixture's probability is (1 - λ) of the base's.
    base, knn = (
        [entry["positions"] * entry["probability"] for entry in rows[name]["calibration"]["bins"]]
        for name in ("base", "base+knn_exact")
    )
    assert sum(knn) == pytest.approx((1 - rows["base+knn_exact"]["lambda"]) * sum(base))
    assert rows["base+memory"]["calibration"] is not None


def test_the_page_shows_breakdowns_speeds_and_samples(whole, evaluation, tmp_path):
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
    rows = {row["name"]: row for row in evaluation["arms"]}
    for arm, columns in ((knn, 3), (memory, 1)):
        tuning = arm.scores["tuning"].reshape(len(base.scores["tuning"]), columns)
        perplexities = {
            (weight, column): _mixture_perplexity(base.scores["tuning"], tuning[:, column], weight)
            for weight in LAMBDAS
            for column in range(columns)
        }
        weight, column = min(perplexities, key=perplexities.get)
        row = rows[arm.name]
        assert row["lambda"] == weight
        assert 0 < weight < 1
        assert row["temperature"] == (arm.temperatures[column] if columns > 1 else None)
        assert row["neighbours"] == (arm.neighbours[column] if columns > 1 else None)
        for split in SPLITS:
            other = arm.scores[split].reshape(-1, columns)[:, column]
            wanted = _mixture_perplexity(base.scores[split], other, weight)
            base_wanted = _mixture_perplexity(base.scores[split], other, 0.0)
            assert row["splits"][split]["ppl"] == pytest.approx(wanted, rel=1e-9)
            assert row["splits"][split]["ppl_change"] == pytest.approx(wanted / base_wanted - 1, rel=1e-6)
            assert row["splits"][split]["win_rate"] == pytest.approx((other > base.scores[split]).mean())
        assert row["ppl"] == row["splits"]["test"]["ppl"]


def test_the_choice_does_not_look_at_the_test_splits(arms, evaluation):
    shuffled = [
        _arm(
            arm.name,
            {
                split: scores if split == "tuning" else scores[::-1] - (0 if arm.alone else 1)
                for split, scores in arm.scores.items()
            },
            alone=arm.alone,
            temperatures=arm.temperatures,
        )
        for arm in arms
    ]
    again = summarize(shuffled, PROTOCOL)
    for before, after in zip(evaluation["arms"], again["arms"], strict=True):
        assert (before["lambda"], before["temperature"]) == (after["lambda"], after["temperature"])
        assert before["splits"]["tuning"] == after["splits"]["tuning"]


def test_knn_alone_is_never_chosen_even_where_the_tuning_split_likes_it_best(arms):
    base = arms[0]
    sure = {split: np.full((size, 1), -1e-6, np.float32) for split, size in SPLITS.items()}
    sure["test"][5] = -np.inf
    row = summarize([base, _arm("base+knn_exact", sure, temperatures=(1.0,))], PROTOCOL)["arms"][1]
    assert row["lambda"] == LAMBDAS[-2]
    assert math.isfinite(row["ppl"])
    memory = {split: scores[:, 0] for split, scores in sure.items()} | {"test": np.full(SPLITS["test"], -0.1)}
    assert summarize([base, _arm("base+memory", memory)], PROTOCOL)["arms"][1]["lambda"] == 1.0


def test_shares_wins_and_paired_changes(evaluation):
    ppl = {row["name"]: row["ppl"] for row in evaluation["arms"]}
    share = (ppl["base"] - ppl["base+memory"]) / (ppl["base"] - ppl["base+knn_exact"])
    assert evaluation["recovered_share"] == pytest.approx(share)
    assert evaluation["wins"] == {"base_trained_on": ppl["base+memory"] < ppl["base_trained_on"]}
    assert set(evaluation["against"]) == {"base", "base+knn_exact", "base_trained_on"}
    for name, numbers in evaluation["against"].items():
        assert numbers["ppl_change"] == pytest.approx(ppl["base+memory"] / ppl[name] - 1)
        low, high = numbers["ppl_interval"]
        assert low < numbers["ppl_change"] < high


def test_without_a_memory_or_a_gain_there_is_no_share(arms):
    assert summarize(arms[:2], PROTOCOL)["recovered_share"] is None
    assert summarize(arms[:2], PROTOCOL)["wins"] == {}
    useless = {split: np.full((size, 1), -np.inf, np.float32) for split, size in SPLITS.items()}
    summary = summarize([arms[0], _arm("base+knn_exact", useless, temperatures=(1.0,)), arms[2]], PROTOCOL)
    assert summary["recovered_share"] is None
    assert summary["arms"][1]["lambda"] == 0.0
    assert summary["arms"][1]["ppl"] == summary["arms"][0]["ppl"]


def test_bits_per_byte_counts_all_positions_over_the_bytes_of_the_text(arms, evaluation):
    wanted = -arms[0].scores["test"].sum() / math.log(2) / PROTOCOL.num_bytes["test"]
    assert evaluation["arms"][0]["bits_per_byte"] == pytest.approx(wanted)


def test_table_has_a_line_an_arm_and_its_numbers(evaluation):
    lines = render_table(evaluation).splitlines()
    assert len(lines) == 3 + len(evaluation["arms"])
    assert f"{evaluation['recovered_share']:.0%}" in lines[-1]
    for line, arm in zip(lines[2:-1], evaluation["arms"], strict=True):
        assert line.startswith(arm["name"] + " ")
        assert f"{arm['ppl']:.2f}" in line and f"{arm['splits']['heldout']['ppl']:.2f}" in line
    knn = lines[3]
    assert "2.3 GB" in knn and "4.27 M" in knn and "8,000" in knn
    assert "heldout ppl" in lines[0]


def test_report_says_what_a_reader_must_know(evaluation):
    text = render_report(evaluation)
    memory = next(arm for arm in evaluation["arms"] if arm["name"] == "base+memory")
    for needle in (
        f"**{memory['ppl']:.2f} with the memory",
        "## What is equal, and what is not",
        "## How λ was chosen",
        "## Second test set: heldout",
        "| base_trained_on |",
        "was chosen on the tuning split (700 tokens)",
        "against `base_trained_on`",
        f"{100 * evaluation['recovered_share']:.0f} % of what an exact search",
        "(lambda.png)",
        "(cost.png)",
        "of 2, 8 neighbours",
    ):
        assert needle in text, needle
    assert "None" not in text and "nan" not in text
    assert "IVF-PQ" not in text
    table = [line for line in text.splitlines() if line.startswith("| base")]
    assert all(line.count("|") == table[0].count("|") for line in table[: len(evaluation["arms"])])


def test_a_memory_that_loses_is_reported_as_losing(arms, evaluation):
    worse = _arm("base+memory", arms[2].scores)
    better = _arm(
        "base_trained_on", {split: scores + 1.0 for split, scores in arms[0].scores.items()}, alone=True
    )
    summary = summarize([arms[0], worse, better], PROTOCOL)
    assert summary["wins"] == {"base_trained_on": False}
    text = render_report({**evaluation, **summary})
    line = next(line for line in text.splitlines() if line.startswith("- against `base_trained_on`"))
    assert "worse" in line and "+" in line


def test_plots_are_png_and_the_same_from_the_same_numbers(evaluation, tmp_path):
    for plot in (plot_lambda_curves, plot_costs):
        plot(evaluation, tmp_path / "one.png")
        plot(evaluation, tmp_path / "two.png")
        content = (tmp_path / "one.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
        assert content == (tmp_path / "two.png").read_bytes()


def test_an_arm_that_is_far_worse_does_not_stretch_the_plots(arms, whole, monkeypatch, tmp_path):
    groups = Groups(name=KIND, labels=("letters", "none", "digits"), of_N=np.arange(900) % 2 * 2)
    hopeless = _arm("hopeless", {split: scores - 4.0 for split, scores in arms[0].scores.items()}, alone=True)
    figures = []
    monkeypatch.setattr(report_plots, "_save", lambda figure, path: figures.append(figure))
    evaluation = {**whole, **summarize([*arms, hopeless], PROTOCOL, [groups])}
    plot_lambda_curves(evaluation, tmp_path / "lambda.png")
    plot_wins(evaluation, tmp_path / "wins.png")
    base_ppl = evaluation["arms"][0]["splits"]["tuning"]["ppl"]
    low, high = figures[0].axes[0].get_ylim()
    assert (
        0 < low < min(arm["splits"]["tuning"]["ppl"] for arm in evaluation["arms"])
        and base_ppl < high < 2 * base_ppl
    )
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert [label for label in labels if "above" in label] == [
        f"hopeless: {base_ppl * math.exp(4):,.4g}, above"
    ]
    (kinds,) = evaluation["breakdowns"]
    others = [numbers for name, numbers in kinds["arms"].items() if name != "hopeless"]
    most = 1000 * max(max(numbers["won"]) for numbers in others)
    assert (
        most
        < figures[1].axes[0].get_xlim()[1]
        < 1.2 * most + 1200 * max(-min(numbers["lost"]) for numbers in others)
    )
    assert figures[1].axes[0].get_xlim()[0] > 1000 * min(kinds["arms"]["hopeless"]["lost"])
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
