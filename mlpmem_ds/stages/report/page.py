"""Last stage: eval.json's numbers → the table for a terminal and the Markdown page that a person reads at a
glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlpmem_ds.stages.report.breakdowns import CALIBRATION_BINS, shows_wins
from mlpmem_ds.stages.report.summary import BASE, BYTES_NOTE, KNN_EXACT, KNN_IVFPQ, MEMORY
from mlpmem_ds.stages.report.words import interval_text, number_text, percent_text, scaled_text


def render_table(evaluation: Mapping[str, Any]) -> str:
    """The table as aligned plain text, for a terminal."""
    header, rows = _table(evaluation)
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    share = evaluation["recovered_share"]
    note = (
        []
        if share is None
        else [f"the memory's gain is {share:.0%} of that of an exact search over all the keys"]
    )
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *note])


def _table(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    extra = evaluation["extra_splits"]
    header = [
        "arm",
        "test ppl",
        "change",
        "95 % interval",
        *(f"{split} ppl" for split in extra),
        "bits/byte",
        "ECE",
        "λ",
        "wins",
        "parameters",
        "on disk",
        "tokens read",
        "made in",
        "tokens/s",
    ]
    rows = [
        [
            arm["name"],
            f"{arm['ppl']:.2f}",
            percent_text(arm["ppl_change"]),
            interval_text(arm["ppl_interval"]),
            *(f"{arm['splits'][split]['ppl']:.2f}" for split in extra),
            f"{arm['bits_per_byte']:.3f}",
            number_text(_calibration_error(arm), "{:.3f}"),
            number_text(arm["lambda"], "{:.2f}"),
            number_text(arm["win_rate"], "{:.2f}"),
            scaled_text(arm["parameters"]),
            scaled_text(arm["bytes"], "B"),
            "–" if arm["tokens"] is None else scaled_text(arm["tokens"]),
            "–" if arm["name"] == BASE else number_text(arm["seconds"], "{:.0f} s"),
            number_text(arm["tokens_per_second"], "{:,.0f}"),
        ]
        for arm in evaluation["arms"]
    ]
    return header, rows


def render_report(evaluation: Mapping[str, Any]) -> str:
    """report.md: the answer, the table, what is equal and what is not, how λ was chosen, how to read each
    column."""
    header, rows = _table(evaluation)
    table = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1)), *map(_line, rows)]
    sections = [
        f"# Evaluation, {evaluation['date']}",
        *_headline(evaluation),
        "\n".join(table),
        _plots(evaluation),
        *_comparisons(evaluation),
        *_equalities(evaluation),
        *_choices(evaluation),
        *_second_tests(evaluation),
        *_breakdowns(evaluation),
        *_speeds(evaluation),
        *_samples(evaluation),
        *_reading(evaluation),
    ]
    return "\n\n".join(sections) + "\n"


def _calibration_error(arm: Mapping[str, Any]) -> float | None:
    return None if arm.get("calibration") is None else arm["calibration"]["error"]


def _plots(evaluation: Mapping[str, Any]) -> str:
    lines = ["![λ on the tuning split](lambda.png)", "![what a token costs](cost.png)"]
    if shows_wins(evaluation):
        lines.append("![where the arms win and lose](wins.png)")
    if evaluation.get("speeds"):
        lines.append("![speed against datastore size](speed.png)")
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _headline(evaluation: Mapping[str, Any]) -> list[str]:
    arms = {arm["name"]: arm for arm in evaluation["arms"]}
    if MEMORY not in arms:
        return []
    memory, base = arms[MEMORY], arms[BASE]
    text = (
        f"On the {evaluation['test_split']} split ({evaluation['tokens'][evaluation['test_split']]:,} tokens)"
        f" the base has a perplexity of {base['ppl']:.2f}, and **{memory['ppl']:.2f} with the memory:"
        f" {percent_text(memory['ppl_change'])}**, 95 % interval {interval_text(memory['ppl_interval'])}."
    )
    if evaluation["recovered_share"] is not None:
        text += (
            f" That is {100 * evaluation['recovered_share']:.0f} % of what an exact search over all the keys"
            f" gains ({percent_text(arms[KNN_EXACT]['ppl_change'])})."
        )
    return [text]


def _comparisons(evaluation: Mapping[str, Any]) -> list[str]:
    if not evaluation["against"]:
        return []
    lines = [
        f"- against `{name}`: {percent_text(numbers['ppl_change'])}"
        f" ({interval_text(numbers['ppl_interval'])}), {_verdict(numbers['ppl_interval'])}"
        for name, numbers in evaluation["against"].items()
    ]
    return [
        "## base+memory against each other arm",
        "Change of test perplexity, paired; negative: the memory is better.",
        "\n".join(lines),
    ]


def _verdict(interval: Sequence[float]) -> str:
    if interval[1] < 0:
        return "better"
    return "worse" if interval[0] > 0 else "no clear difference"


def _equalities(evaluation: Mapping[str, Any]) -> list[str]:
    settings = evaluation["settings"]
    names = {arm["name"] for arm in evaluation["arms"]}
    equal = [
        (
            f"the positions, and the context of each: windows of {settings['block_size']} tokens, every"
            f" {settings['stride']}"
        ),
        "the vocabulary; the base, frozen, in every arm whose name begins with `base+`",
        f"how λ was chosen: the same {len(evaluation['lambdas'])} values on the same tuning split",
    ]
    unequal = [
        (
            "parameters, bytes, the time that making an arm took and the speed of scoring: the table's last"
            " columns"
        ),
        "a kNN arm chooses a temperature and a number of neighbours besides λ",
    ]
    if KNN_IVFPQ in names:
        unequal.append(
            "`base+knn_ivfpq` finds its candidates by IVF-PQ, and their distances are then computed from the"
            " stored keys: PQ's own distances would do worse"
        )
    return [
        "## What is equal, and what is not",
        "Equal: " + "; ".join(equal) + ".",
        "Not equal: " + "; ".join(unequal) + ".",
    ]


def _choices(evaluation: Mapping[str, Any]) -> list[str]:
    settings, lambdas = evaluation["settings"], evaluation["lambdas"]
    lines = [
        f"λ, the weight of what is mixed with the base, was chosen on the {evaluation['tuning_split']} split"
        f" ({evaluation['tokens'][evaluation['tuning_split']]:,} tokens) among {len(lambdas)} values from"
        f" {lambdas[0]:g} to {lambdas[-1]:g}; the other splits were read once, at that λ."
    ]
    lines += [
        f"- `{arm['name']}`: λ {arm['lambda']:g}"
        + (f", temperature {arm['temperature']:.6g}" if arm["temperature"] is not None else "")
        + (f", {arm['neighbours']} neighbours" if arm["neighbours"] is not None else "")
        + (" (the most that were tried)" if arm["neighbours"] == settings["k"] is not None else "")
        + (" (the end of the grid)" if arm["lambda"] in (lambdas[0], lambdas[-1]) else "")
        for arm in evaluation["arms"]
        if arm["lambda"] is not None
    ]
    if settings["k"] is not None:
        lines.append(
            "\nkNN: of"
            f" {_listed(sorted({max(1, settings['k'] // by) for by in settings['neighbour_divisors']}))}"
            f" neighbours, with temperatures of {_listed(settings['temperature_factors'])} times"
            f" {settings['temperature']:.6g}, the best on that split"
            + (f"; IVF-PQ probes {settings['nprobe']} lists." if settings["nprobe"] is not None else ".")
        )
    return ["## How λ was chosen", "\n".join(lines)]


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _second_tests(evaluation: Mapping[str, Any]) -> list[str]:
    sections = []
    for split in evaluation["extra_splits"]:
        rows = [
            _line(
                [
                    arm["name"],
                    f"{arm['splits'][split]['ppl']:.2f}",
                    percent_text(arm["splits"][split]["ppl_change"]),
                    interval_text(arm["splits"][split]["ppl_interval"]),
                ]
            )
            for arm in evaluation["arms"]
        ]
        meaning = (
            "groups of documents of which nothing was trained on"
            if split == "heldout"
            else "a further test set"
        )
        sections += [
            f"## Second test set: {split}",
            f"{evaluation['tokens'][split]:,} tokens, {meaning}; λ as chosen above.",
            "\n".join(
                [_line(["arm", "ppl", "change", "95 % interval"]), _line(["---"] + ["---:"] * 3), *rows]
            ),
        ]
    return sections


def _breakdowns(evaluation: Mapping[str, Any]) -> list[str]:
    """Where each arm is better than the base, and where it is not."""
    sections = []
    for breakdown in evaluation.get("breakdowns", []):
        names = list(breakdown["arms"])
        header = [breakdown["name"], "positions", "base ppl", *names]
        rows = [
            [
                label,
                f"{breakdown['positions'][number]:,}",
                number_text(breakdown["base_ppl"][number], "{:,.4g}"),
                *(percent_text(breakdown["arms"][name]["ppl_change"][number]) for name in names),
            ]
            for number, label in enumerate(breakdown["labels"])
        ]
        table = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1)), *map(_line, rows)]
        sections += [f"### By {breakdown['name']}", "\n".join(table)]
    if not sections:
        return []
    intro = (
        f"Change of perplexity against the base on the {evaluation['test_split']} split, each arm at its λ."
        " In a group of a few dozen positions it may be nothing but chance."
    )
    return ["## Where the arms win and lose", intro, *sections]


def _speeds(evaluation: Mapping[str, Any]) -> list[str]:
    speeds = evaluation.get("speeds") or []
    if not speeds:
        return []
    sizes = sorted({row["keys"] for row in speeds if row["keys"] is not None})
    rows = []
    for name in dict.fromkeys(row["arm"] for row in speeds):
        rates = {row["keys"]: row["tokens_per_second"] for row in speeds if row["arm"] == name}
        rows.append([name, *(f"{rates.get(size, rates.get(None)):,.0f}" for size in sizes)])
    header = ["arm", *(f"{size:,} keys" for size in sizes)]
    return [
        "## Speed against the size of the datastore",
        (
            f"Tokens a second, scoring the same {speeds[0]['positions']:,} positions, the base's pass"
            " included; the datastore is the first part of the keys. An arm without a datastore was measured"
            " once."
        ),
        "\n".join([_line(header), _line(["---"] + ["---:"] * len(sizes)), *map(_line, rows)]),
    ]


def _samples(evaluation: Mapping[str, Any]) -> list[str]:
    samples = evaluation.get("samples") or []
    if not samples:
        return []
    lmbda = next(arm["lambda"] for arm in evaluation["arms"] if arm["name"] == MEMORY)
    blocks = [
        f"Sample {number}, the text before:\n\n{_fenced(sample['prompt'])}"
        f"\n\nbase:\n\n{_fenced(sample['base'])}"
        f"\n\nbase + memory:\n\n{_fenced(sample['memory'])}"
        for number, sample in enumerate(samples, start=1)
    ]
    intro = (
        f"Always the likeliest token, after passages of the {evaluation['test_split']} split taken at even"
        f" distances; the memory at λ = {lmbda:g}. Nobody chose them."
    )
    return ["## Samples of text, without and with the memory", intro, *blocks]


def _fenced(text: str) -> str:
    """A Markdown code block that the text cannot end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def _reading(evaluation: Mapping[str, Any]) -> list[str]:
    settings = evaluation["settings"]
    notes = [
        (
            "change and interval: of perplexity, relative to `base`; paired block bootstrap,"
            f" {settings['bootstrap_samples']:,} samples of blocks of {settings['bootstrap_block']}"
            " positions. It covers the choice of text, not the choice of λ nor another training run"
        ),
        "bits/byte: bits spent on all positions, end-of-document tokens too, by UTF-8 byte of text",
        (
            "ECE: expected calibration error of the likeliest token's probability on the"
            f" {evaluation['test_split']} split, {CALIBRATION_BINS} bins of equal width; for base+… arms the"
            " token is the base's likeliest, at the arm's λ"
        ),
        (
            "wins: share of the positions where what is mixed in (or the control itself) gives the true token"
            " more probability than the base does; no λ changes it"
        ),
        f"on disk: {BYTES_NOTE}"
        + (
            "; the memories were rounded to int8 once read"
            if settings.get("memory_weights") == "int8"
            else ""
        ),
        (
            "tokens read: what making the arm read beyond the base, each time that it was read: positions of"
            " its training's steps; stored keys for kNN; – where it is not known"
        ),
        (
            "made in: wall-clock seconds of the stages that the arm needs and the base does not, from their"
            " logs; – where a log was not given"
        ),
        (
            "tokens/s: scoring the test split here, the base's pass and the arm's own part, median over"
            f" blocks, on {settings['threads']} threads a process ({evaluation['machine'].get('cores')}"
            f" cores, {settings['device']})"
        ),
    ]
    return ["## How to read the table", "\n".join(f"- {note}" for note in notes)]
