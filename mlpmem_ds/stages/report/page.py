"""Part of `evaluate`: eval.json's figures → report.md, a page for somebody who has not read the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlpmem_ds.formats.evaluation import ArmFigures, Change, Evaluation
from mlpmem_ds.formats.gates import WeightFigures
from mlpmem_ds.stages.report.breakdowns import shows_wins
from mlpmem_ds.stages.report.table import columns, markdown_of_arms, markdown_table
from mlpmem_ds.stages.report.words import interval_text, listed_text, number_text, percent_text


def render_report(evaluation: Evaluation) -> str:
    """The page: result, arms, table with its columns explained, plots, choices, details, limits."""
    sections = [
        f"# Evaluation of the base `{evaluation.model}`, {evaluation.date}",
        *_introduction(evaluation),
        *_arms(evaluation),
        *_table(evaluation),
        *_comparisons(evaluation),
        *_plots(evaluation),
        *_choices(evaluation),
        *_equalities(evaluation),
        *_second_tests(evaluation),
        *_breakdowns(evaluation),
        *_speeds(evaluation),
        *_samples(evaluation),
        *_limits(evaluation),
    ]
    return "\n\n".join(sections) + "\n"


def _introduction(evaluation: Evaluation) -> list[str]:
    """What was done, and the result in a sentence."""
    test = evaluation.test_split
    what = (
        "How well is the next token of a text predicted? This page compares several ways to predict it,"
        f" *arms*, on the {test} split of `{evaluation.corpus}`: {evaluation.tokens[test]:,} tokens that no"
        " arm was trained on. All of them are given the same context."
    )
    if evaluation.subject is None:
        return [what]
    subject, base = evaluation.arm(evaluation.subject), evaluation.base
    result = (
        f"**Result.** The base alone has a perplexity of {base.ppl:.2f}, and **{subject.ppl:.2f} with the"
        f" memory: {percent_text(subject.ppl_change)}** (95 % interval"
        f" {interval_text(subject.ppl_interval)}; lower is better)."
    )
    if evaluation.recovered_share is not None and evaluation.reference is not None:
        reference = evaluation.arm(evaluation.reference)
        result += (
            f" That is {100 * evaluation.recovered_share:.0f} % of what an exact search over all the keys"
            f" gains ({percent_text(reference.ppl_change)}): that retriever is what the memory was made to"
            " replace."
        )
    return [what, result]


def _arms(evaluation: Evaluation) -> list[str]:
    lines = [f"- `{arm.name}`: {arm.description}." for arm in evaluation.arms]
    but_for_gates = ", but for arms with a gate, which gives λ at each token" if _gated(evaluation) else ""
    mixture = (
        "An arm named `base+…` mixes two distributions: p(token) = (1 − λ) · p_base(token) + λ ·"
        f" p_other(token), with the same weight λ for every token{but_for_gates}. Another name stands for a"
        " language model alone."
    )
    controls = (
        "What the controls are for: a memory brings more parameters and more training on the same text, and"
        " either could explain a gain. A control has the one without the other, or spends the same effort"
        " otherwise; the memory is worth its price where it is better than they are."
    )
    has_controls = bool(evaluation.wins)
    return ["## The arms", "\n".join(lines), mixture, *([controls] if has_controls else [])]


def _table(evaluation: Evaluation) -> list[str]:
    meanings = [f"- **{column.title}**: {column.meaning}" for column in columns(evaluation)]
    return [
        "## The table",
        markdown_of_arms(evaluation),
        "How to read it:",
        "\n".join(meanings),
    ]


def _comparisons(evaluation: Evaluation) -> list[str]:
    if not evaluation.against:
        return []
    lines = [
        f"- against `{name}`: {percent_text(change.ppl_change)} ({interval_text(change.ppl_interval)}),"
        f" {_verdict(change)}"
        for name, change in evaluation.against.items()
    ]
    return [
        f"## {evaluation.subject} against each other arm",
        "Change of test perplexity from that arm to the memory, position by position, with its 95 % interval;"
        " negative: the memory is better. It is called better or worse where the interval does not contain"
        " 0.",
        "\n".join(lines),
    ]


def _verdict(change: Change) -> str:
    low, high = change.ppl_interval
    if high < 0:
        return "better"
    return "worse" if low > 0 else "no clear difference"


def _plots(evaluation: Evaluation) -> list[str]:
    tuning, test = evaluation.tuning_split, evaluation.test_split
    where = "" if evaluation.choices_from is None else " in another report"
    plots = [
        (
            "lambda.png",
            "λ on the tuning split",
            f"Perplexity of the {tuning} split over λ. At the left end, λ = 0, every mixture is the base; the"
            f" circle is the λ that was chosen{where}. Dashed lines are arms without one λ to choose: models"
            " alone, gates, banks.",
        ),
        (
            "cost.png",
            "what an arm costs",
            "What an arm needs on disk, and the time to score a token with it.",
        ),
    ]
    if shows_wins(evaluation):
        plots.append(
            (
                "wins.png",
                "where the arms win and lose",
                f"Where the gain is made, by kind of token of the {test} split: the sum of log(p_arm /"
                " p_base) over the positions at which the arm gives the token more than the base (full, to"
                " the right) and less (pale, to the left). The dot is the sum of both; all dots of an arm add"
                " up to its gain.",
            )
        )
    if evaluation.speeds:
        plots.append(
            (
                "speed.png",
                "speed against datastore size",
                "Tokens scored a second over the number of stored keys. An arm that searches slows down as"
                " the datastore grows; the others, level lines, do not.",
            )
        )
    return ["## The plots", *(f"![{title}]({file})\n\n{caption}" for file, title, caption in plots)]


def _choices(evaluation: Evaluation) -> list[str]:
    lambdas, tuning = evaluation.lambdas, evaluation.tuning_split
    mixed = [arm for arm in evaluation.arms if arm.lmbda is not None]
    tokens = f"the {tuning} split ({evaluation.tokens[tuning]:,} tokens)"
    if evaluation.choices_from is None:
        text = (
            f"λ was chosen on {tokens}, which is not among the reported ones: the best of"
            f" {len(lambdas)} values from {lambdas[0]:g} to {lambdas[-1]:g}, together with what else an arm"
            " leaves open. The other splits were read once, at that choice."
        )
        lines = [f"- `{arm.name}`: {_choice_text(arm, lambdas)}" for arm in mixed]
    else:
        text = (
            "λ was not chosen here: each arm without a gate takes it, and what else it leaves open, from the"
            f" report `{evaluation.choices_from}`. The plot's curves are of {tokens}."
        )
        lines = [f"- `{arm.name}`: {_taken_text(arm)}" for arm in mixed]
    lines += [
        f"- `{arm.name}`: {_gate_text(weights[evaluation.test_split])}" for arm, weights in _gated(evaluation)
    ]
    return ["## How λ was chosen", "\n".join([text, "", *lines])] if lines else []


def _gated(evaluation: Evaluation) -> list[tuple[ArmFigures, Mapping[str, WeightFigures]]]:
    """The arms whose λ a gate gives, with the figures of their weights by split."""
    return [(arm, arm.weights) for arm in evaluation.arms if arm.lmbda is None and arm.weights is not None]


def _gate_text(weights: WeightFigures) -> str:
    low, _, middle, _, high = weights.quantiles
    return (
        f"a gate gives λ at each token, on the test split {weights.mean:.2f} on average, half of the time"
        f" below {middle:.2f}, and nine times in ten between {low:.2f} and {high:.2f}"
    )


def _choice_text(arm: ArmFigures, lambdas: Sequence[float]) -> str:
    if arm.weights is not None:
        return f"λ {arm.lmbda:.3g} in all, the best weights on that split: {_weights_text(arm)}"
    at_end = " (the end of the grid)" if arm.lmbda in (lambdas[0], lambdas[-1]) else ""
    parts = [f"λ {arm.lmbda:g}{at_end}"]
    for name, value in arm.chosen.items():
        tried = arm.tried[name]
        largest = "; the largest that was tried" if value == tried[-1] and len(tried) > 1 else ""
        parts.append(f"{name} {value:.6g} (of {listed_text(tried)}{largest})")
    return ", ".join(parts)


def _taken_text(arm: ArmFigures) -> str:
    if arm.weights is not None:
        return f"λ {arm.lmbda:.3g} in all, the weights of that report: {_weights_text(arm)}"
    return ", ".join([f"λ {arm.lmbda:g}", *(f"{name} {value:.6g}" for name, value in arm.chosen.items())])


def _weights_text(arm: ArmFigures) -> str:
    return ", ".join(f"{name.removeprefix('lambda_')} {value:.3g}" for name, value in arm.chosen.items())


def _equalities(evaluation: Evaluation) -> list[str]:
    settings = evaluation.settings
    if evaluation.choices_from is None:
        has_weights = any(arm.weights is not None for arm in evaluation.arms)
        others = " (but for gates and banks)" if has_weights else ""
        choice = (
            f"how λ was chosen{others}: the same {len(evaluation.lambdas)} values on the same tuning split"
        )
    else:
        choice = f"where λ was chosen: in `{evaluation.choices_from}`"
    equal = [
        (
            f"the positions, and the context of each: windows of {settings.block_size} tokens, every"
            f" {settings.stride}"
        ),
        "the vocabulary; the base, frozen, in every arm whose name begins with `base+`",
        choice,
        f"the precision of the forward passes: {settings.dtype}",
    ]
    unequal = [
        "parameters, bytes, the time that making an arm took and the speed of scoring: the table's last"
        " columns"
    ]
    if names := sorted({name for arm in evaluation.arms for name in arm.chosen}):
        choosing = ", ".join(f"`{arm.name}`" for arm in evaluation.arms if arm.chosen)
        unequal.append(f"{choosing} may choose {' and '.join(names)} besides λ")
    return [
        "## What is equal, and what is not",
        "Equal: " + "; ".join(equal) + ".",
        "Not equal: " + "; ".join(unequal) + ".",
    ]


def _second_tests(evaluation: Evaluation) -> list[str]:
    sections = []
    for split in evaluation.extra_splits:
        rows = [
            [
                arm.name,
                f"{arm.splits[split].ppl:.2f}",
                percent_text(arm.splits[split].ppl_change),
                interval_text(arm.splits[split].ppl_interval),
            ]
            for arm in evaluation.arms
        ]
        meaning = (
            "groups of documents of which nothing was trained on: text further from the training text"
            if split == "heldout"
            else "a further test set"
        )
        sections += [
            f"## Second test set: {split}",
            f"{evaluation.tokens[split]:,} tokens, {meaning}; λ as above.",
            markdown_table(["arm", "ppl", "change", "95 % interval"], rows),
        ]
    return sections


def _breakdowns(evaluation: Evaluation) -> list[str]:
    """Where each arm is better than the base, and where it is not."""
    sections = []
    for breakdown in evaluation.breakdowns:
        rows = [
            [
                label,
                f"{breakdown.positions[number]:,}",
                number_text(breakdown.base_ppl[number], "{:,.4g}"),
                *(percent_text(figures.ppl_change[number]) for figures in breakdown.arms.values()),
            ]
            for number, label in enumerate(breakdown.labels)
        ]
        header = [breakdown.name, "positions", "base ppl", *breakdown.arms]
        sections += [f"### By {breakdown.name}", markdown_table(header, rows)]
    if not sections:
        return []
    intro = (
        f"Change of perplexity against the base in groups of the {evaluation.test_split} split, each arm at"
        " its λ. In a group of a few dozen positions it may be nothing but chance. The entropy is the base's"
        " own uncertainty, known before the token is: 0 nats where it is sure of one token, 3 nats where"
        " about 20 are equally likely."
    )
    return ["## Where the arms win and lose", intro, *sections]


def _speeds(evaluation: Evaluation) -> list[str]:
    speeds = evaluation.speeds
    if not speeds:
        return []
    sizes = sorted({speed.keys for speed in speeds if speed.keys is not None})
    rows = []
    for name in dict.fromkeys(speed.arm for speed in speeds):
        rates = {speed.keys: speed.tokens_per_second for speed in speeds if speed.arm == name}
        rows.append([name, *(f"{rates.get(size, rates.get(None, 0)):,.0f}" for size in sizes)])
    return [
        "## Speed against the size of the datastore",
        (
            f"Tokens a second, scoring the same {speeds[0].positions:,} positions, the base's pass included;"
            " the datastore is the first part of the keys. An arm without a datastore was measured once."
        ),
        markdown_table(["arm", *(f"{size:,} keys" for size in sizes)], rows),
    ]


def _samples(evaluation: Evaluation) -> list[str]:
    if not evaluation.samples or evaluation.subject is None:
        return []
    lmbda = evaluation.arm(evaluation.subject).lmbda
    blocks = [
        f"Sample {number}, the text before:\n\n{_fenced(sample.prompt)}"
        f"\n\nbase:\n\n{_fenced(sample.base)}"
        f"\n\nbase + memory:\n\n{_fenced(sample.memory)}"
        for number, sample in enumerate(evaluation.samples, start=1)
    ]
    intro = (
        f"Always the likeliest token, after passages of the {evaluation.test_split} split taken at even"
        f" distances and not chosen by hand; the memory at λ = {lmbda:g}."
    )
    return ["## Samples of text, without and with the memory", intro, *blocks]


def _fenced(text: str) -> str:
    """A Markdown code block that the text cannot end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def _limits(evaluation: Evaluation) -> list[str]:
    limits = [
        "an interval covers the choice of text, and neither the choice of λ nor another training run: each"
        " arm was trained once",
        "the text is of one corpus; on other text a gain may be smaller, or a loss",
        "perplexity is about the probability of given text; it does not say that generated text is better",
        "speed was measured on this machine, with other programs running; on another device the order of"
        " the arms may differ",
    ]
    if evaluation.recovered_share is not None:
        limits.append(
            "the share of the search's gain may pass 100 %: a memory that is also trained on the text itself"
            " learns more than the search can tell it"
        )
    return ["## Limits", "\n".join(f"- {limit}" for limit in limits)]
