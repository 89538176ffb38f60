"""Last stage, second half: log-probabilities of the arms → the table, the page and the plots that a person reads.

An *arm* is one way to predict: a model alone (`base`, a control), or the base mixed with something else, with weight λ.
Nothing here runs a model: every number comes from log-probabilities of positions, two a position and arm, so that any
λ, temperature or split costs nothing. Used by `evaluate`; natural logarithms, float64.

N = positions of a split, T = temperatures, G = grid of λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.files import publish
from mlpmem_ds.maths.interpolation import interpolate
from mlpmem_ds.maths.scores import bits_per_byte, bootstrap_interval, lambda_curve, perplexity, win_rate

BASE, KNN_EXACT, KNN_IVFPQ, MEMORY = "base", "base+knn_exact", "base+knn_ivfpq", "base+memory"
BYTES_NOTE = "bytes on disk that the arm reads: weights and configuration; keys, values and index for kNN"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to predict, and its price.

    `scores` holds for each split the natural log-probabilities of the values: [N], or [N, T] where a temperature is still
    to be chosen. `alone`: they are the arm's own; else they are mixed with the base's. `seconds` is what making the arm
    took beyond the base; None where it is not known.
    """

    name: str
    scores: Mapping[str, np.ndarray]
    alone: bool
    parameters: int
    bytes: int
    seconds: float | None
    tokens_per_second: float | None
    temperatures: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the arms are compared."""

    tuning: str
    tests: tuple[str, ...]  # the first is the test split, the others are further test sets
    num_bytes: Mapping[str, int]  # split → UTF-8 bytes of its text
    lambdas: tuple[float, ...]
    bootstrap_samples: int
    bootstrap_block: int


def summarise(arms: Sequence[Arm], protocol: Protocol) -> dict[str, Any]:
    """The numbers of eval.json: λ and temperature are chosen on the tuning split, everything else is read at that choice.

    Args:
        arms: the first is the base.
    """
    base = arms[0]
    rows, final_scores = [], {}
    for arm in arms:
        choice = _choose(base, arm, protocol)
        final = _final_scores(base, arm, choice)
        final_scores[arm.name] = final
        splits = {
            split: _split_numbers(base, final, arm, choice, split, protocol)
            for split in (protocol.tuning, *protocol.tests)
        }
        rows.append(
            {
                "name": arm.name,
                **splits[protocol.tests[0]],
                "splits": splits,
                "lambda": choice["lambda"],
                "temperature": choice["temperature"],
                "parameters": arm.parameters,
                "bytes": arm.bytes,
                "seconds": arm.seconds,
                "tokens_per_second": arm.tokens_per_second,
                "tuning_curve": choice["curve"],
            }
        )
    return {
        "arms": rows,
        "recovered_share": _recovered_share(rows),
        "against": _against(final_scores, protocol),
        "wins": {
            arm.name: bool(_ppl(rows, MEMORY) < _ppl(rows, arm.name))
            for arm in arms
            if MEMORY in final_scores and arm.name not in (BASE, KNN_EXACT, KNN_IVFPQ, MEMORY)
        },
    }


def _choose(base: Arm, arm: Arm, protocol: Protocol) -> dict[str, Any]:
    """The λ and temperature of the least perplexity on the tuning split, and the curve over λ at that temperature."""
    if arm.alone:
        return {"lambda": None, "temperature": None, "temperature_index": None, "curve": None}
    base_N, other_NT = base.scores[protocol.tuning], arm.scores[protocol.tuning]
    grid_G = np.array(protocol.lambdas)
    # kNN gives most tokens no probability at all: alone it is no language model, so λ = 1 is not among its choices.
    allowed_G = grid_G < 1 if arm.temperatures else np.ones(len(grid_G), dtype=bool)
    columns = other_NT[:, None] if other_NT.ndim == 1 else other_NT
    curves_TG = np.array([lambda_curve(base_N, columns[:, t], grid_G) for t in range(columns.shape[1])])
    t, g = np.unravel_index(np.argmin(np.where(allowed_G, curves_TG, np.inf)), curves_TG.shape)
    curve = [
        {"lambda": float(lmbda), "ppl": float(ppl) if np.isfinite(ppl) else None}
        for lmbda, ppl in zip(grid_G, curves_TG[t], strict=True)
    ]
    return {
        "lambda": float(grid_G[g]),
        "temperature": arm.temperatures[t] if arm.temperatures else None,
        "temperature_index": int(t) if arm.temperatures else None,
        "curve": curve,
    }


def _other(arm: Arm, choice: Mapping[str, Any], split: str) -> np.ndarray:
    """What is mixed with the base, [N], at the chosen temperature."""
    scores = arm.scores[split]
    return scores if choice["temperature_index"] is None else scores[:, choice["temperature_index"]]


def _final_scores(base: Arm, arm: Arm, choice: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Split → the arm's own log-probabilities [N] at the chosen λ and temperature."""
    if arm.alone:
        return {split: scores.astype(np.float64) for split, scores in arm.scores.items()}
    mixed = {}
    for split, base_N in base.scores.items():
        other_N = _other(arm, choice, split)
        log_base_N, log_other_N = (torch.from_numpy(scores.astype(np.float64)) for scores in (base_N, other_N))
        mixed[split] = interpolate(log_base_N, log_other_N, choice["lambda"]).numpy()
    return mixed


def _split_numbers(
    base: Arm, final: Mapping[str, np.ndarray], arm: Arm, choice: Mapping[str, Any], split: str, protocol: Protocol
) -> dict[str, Any]:
    """One arm on one split; the change and its interval are against the base."""
    base_N, arm_N = base.scores[split], final[split]
    numbers: dict[str, Any] = {
        "ppl": perplexity(arm_N),
        "bits_per_byte": bits_per_byte(arm_N, protocol.num_bytes[split]),
    }
    if arm is base:
        return {**numbers, "ppl_change": None, "ppl_interval": None, "win_rate": None}
    return {**numbers, **_change(base_N, arm_N, protocol), "win_rate": win_rate(base_N, _other(arm, choice, split))}


def _change(before_N: np.ndarray, after_N: np.ndarray, protocol: Protocol) -> dict[str, Any]:
    """The relative change of perplexity, negative where `after` is better, and its 95 % interval."""
    interval = bootstrap_interval(
        before_N, after_N, block=protocol.bootstrap_block, num_resamples=protocol.bootstrap_samples
    )
    return {"ppl_change": perplexity(after_N) / perplexity(before_N) - 1, "ppl_interval": list(interval)}


def _ppl(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return next((row["ppl"] for row in rows if row["name"] == name), float("nan"))


def _recovered_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the exact kNN's gain in test perplexity that the memory gives; None without both, or without a gain."""
    base, knn, memory = (_ppl(rows, name) for name in (BASE, KNN_EXACT, MEMORY))
    return (base - memory) / (base - knn) if base > knn and np.isfinite(memory) else None


def _against(final_scores: Mapping[str, Mapping[str, np.ndarray]], protocol: Protocol) -> dict[str, Any]:
    """Arm → the change of test perplexity from that arm to base+memory, paired."""
    if MEMORY not in final_scores:
        return {}
    test = protocol.tests[0]
    return {
        name: _change(scores[test], final_scores[MEMORY][test], protocol)
        for name, scores in final_scores.items()
        if name != MEMORY
    }


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
    note = [] if share is None else [f"the memory's gain is {share:.0%} of that of an exact search over all the keys"]
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
        "λ",
        "wins",
        "parameters",
        "on disk",
        "made in",
        "tokens/s",
    ]
    rows = [
        [
            arm["name"],
            f"{arm['ppl']:.2f}",
            _percent(arm["ppl_change"]),
            _interval(arm["ppl_interval"]),
            *(f"{arm['splits'][split]['ppl']:.2f}" for split in extra),
            f"{arm['bits_per_byte']:.3f}",
            _number(arm["lambda"], "{:.2f}"),
            _number(arm["win_rate"], "{:.2f}"),
            _scaled(arm["parameters"]),
            _scaled(arm["bytes"], "B"),
            "–" if arm["name"] == BASE else _number(arm["seconds"], "{:.0f} s"),
            _number(arm["tokens_per_second"], "{:,.0f}"),
        ]
        for arm in evaluation["arms"]
    ]
    return header, rows


def render_report(evaluation: Mapping[str, Any]) -> str:
    """report.md: the answer, the table, what is equal and what is not, how λ was chosen, how to read each column."""
    header, rows = _table(evaluation)
    table = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1)), *map(_line, rows)]
    sections = [
        f"# Evaluation, {evaluation['date']}",
        *_headline(evaluation),
        "\n".join(table),
        "![λ on the tuning split](lambda.png)\n![what a token costs](cost.png)",
        *_comparisons(evaluation),
        *_equalities(evaluation),
        *_choices(evaluation),
        *_second_tests(evaluation),
        *_reading(evaluation),
    ]
    return "\n\n".join(sections) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _headline(evaluation: Mapping[str, Any]) -> list[str]:
    arms = {arm["name"]: arm for arm in evaluation["arms"]}
    if MEMORY not in arms:
        return []
    memory, base = arms[MEMORY], arms[BASE]
    text = (
        f"On the {evaluation['test_split']} split ({evaluation['tokens'][evaluation['test_split']]:,} tokens) the base has a "
        f"perplexity of {base['ppl']:.2f}, and **{memory['ppl']:.2f} with the memory: {_percent(memory['ppl_change'])}**, "
        f"95 % interval {_interval(memory['ppl_interval'])}."
    )
    if evaluation["recovered_share"] is not None:
        text += (
            f" That is {100 * evaluation['recovered_share']:.0f} % of what an exact search over all the keys gains "
            f"({_percent(arms[KNN_EXACT]['ppl_change'])})."
        )
    return [text]


def _comparisons(evaluation: Mapping[str, Any]) -> list[str]:
    if not evaluation["against"]:
        return []
    lines = [
        f"- against `{name}`: {_percent(numbers['ppl_change'])} ({_interval(numbers['ppl_interval'])}), "
        f"{_verdict(numbers['ppl_interval'])}"
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
        f"the positions, and the context of each: windows of {settings['block_size']} tokens, every {settings['stride']}",
        "the vocabulary; the base, frozen, in every arm whose name begins with `base+`",
        f"how λ was chosen: the same {len(evaluation['lambdas'])} values on the same tuning split",
    ]
    unequal = [
        "parameters, bytes, the time that making an arm took and the speed of scoring: the table's last columns",
        "a kNN arm chooses a temperature besides λ",
    ]
    if KNN_IVFPQ in names:
        unequal.append(
            "`base+knn_ivfpq` finds its candidates by IVF-PQ, and their distances are then computed from the stored "
            "keys: PQ's own distances would do worse"
        )
    return [
        "## What is equal, and what is not",
        "Equal: " + "; ".join(equal) + ".",
        "Not equal: " + "; ".join(unequal) + ".",
    ]


def _choices(evaluation: Mapping[str, Any]) -> list[str]:
    settings, lambdas = evaluation["settings"], evaluation["lambdas"]
    lines = [
        f"λ, the weight of what is mixed with the base, was chosen on the {evaluation['tuning_split']} split "
        f"({evaluation['tokens'][evaluation['tuning_split']]:,} tokens) among {len(lambdas)} values from {lambdas[0]:g} to "
        f"{lambdas[-1]:g}; the other splits were read once, at that λ."
    ]
    lines += [
        f"- `{arm['name']}`: λ {arm['lambda']:g}"
        + (f", temperature {arm['temperature']:.6g}" if arm["temperature"] is not None else "")
        + (" (the end of the grid)" if arm["lambda"] in (lambdas[0], lambdas[-1]) else "")
        for arm in evaluation["arms"]
        if arm["lambda"] is not None
    ]
    if settings["k"] is not None:
        lines.append(
            f"\nkNN: {settings['k']} neighbours, temperatures of "
            f"{', '.join(f'{factor:g}' for factor in settings['temperature_factors'])} times {settings['temperature']:.6g}"
            + (f"; IVF-PQ probes {settings['nprobe']} lists." if settings["nprobe"] is not None else ".")
        )
    return ["## How λ was chosen", "\n".join(lines)]


def _second_tests(evaluation: Mapping[str, Any]) -> list[str]:
    sections = []
    for split in evaluation["extra_splits"]:
        rows = [
            _line(
                [
                    arm["name"],
                    f"{arm['splits'][split]['ppl']:.2f}",
                    _percent(arm["splits"][split]["ppl_change"]),
                    _interval(arm["splits"][split]["ppl_interval"]),
                ]
            )
            for arm in evaluation["arms"]
        ]
        meaning = "groups of documents of which nothing was trained on" if split == "heldout" else "a further test set"
        sections += [
            f"## Second test set: {split}",
            f"{evaluation['tokens'][split]:,} tokens, {meaning}; λ as chosen above.",
            "\n".join([_line(["arm", "ppl", "change", "95 % interval"]), _line(["---"] + ["---:"] * 3), *rows]),
        ]
    return sections


def _reading(evaluation: Mapping[str, Any]) -> list[str]:
    settings = evaluation["settings"]
    notes = [
        "change and interval: of perplexity, relative to `base`; paired block bootstrap, "
        f"{settings['bootstrap_samples']:,} samples of blocks of {settings['bootstrap_block']} positions. It covers the "
        "choice of text, not the choice of λ nor another training run",
        "bits/byte: bits spent on all positions, end-of-document tokens too, by UTF-8 byte of text",
        "wins: share of the positions where what is mixed in (or the control itself) gives the true token more probability "
        "than the base does; no λ changes it",
        f"on disk: {BYTES_NOTE}",
        "made in: wall-clock seconds of the stages that the arm needs and the base does not, from their logs; – where a "
        "log was not given",
        "tokens/s: scoring the test split here, the base's pass and the arm's own part, median over blocks, on "
        f"{settings['threads']} threads a process ({evaluation['machine'].get('cores')} cores, {settings['device']})",
    ]
    return ["## How to read the table", "\n".join(f"- {note}" for note in notes)]


def plot_lambda_curves(evaluation: Mapping[str, Any], path: Path) -> None:
    """Perplexity over λ on the tuning split, a line an arm; models alone are level lines."""
    figure, axes = _figure(1)
    for number, arm in enumerate(evaluation["arms"]):
        tuning_ppl = arm["splits"][evaluation["tuning_split"]]["ppl"]
        if arm["tuning_curve"] is None:
            axes[0].axhline(tuning_ppl, linestyle="--", linewidth=1, color=f"C{number}", label=arm["name"])
            continue
        points = [point for point in arm["tuning_curve"] if point["ppl"] is not None]
        axes[0].plot(
            [point["lambda"] for point in points],
            [point["ppl"] for point in points],
            marker=".",
            color=f"C{number}",
            label=arm["name"],
        )
        axes[0].plot([arm["lambda"]], [tuning_ppl], marker="o", markersize=9, fillstyle="none", color=f"C{number}")
    highest = 1.25 * evaluation["arms"][0]["splits"][evaluation["tuning_split"]]["ppl"]
    if axes[0].get_ylim()[1] > highest:
        axes[0].set_ylim(top=highest)
    axes[0].set(
        xlabel="λ, weight of what is mixed with the base",
        ylabel=f"perplexity, {evaluation['tuning_split']} split",
        title="How λ was chosen (circles)",
    )
    axes[0].legend()
    _save(figure, path)


def plot_costs(evaluation: Mapping[str, Any], path: Path) -> None:
    """Bytes on disk, and microseconds to score a token, an arm a bar."""
    figure, axes = _figure(2)
    names = [arm["name"] for arm in evaluation["arms"]]
    bytes_of_arms = [arm["bytes"] for arm in evaluation["arms"]]
    microseconds = [1e6 / arm["tokens_per_second"] if arm["tokens_per_second"] else 0.0 for arm in evaluation["arms"]]
    panels = (
        ("on disk", bytes_of_arms, lambda value: _scaled(value, "B")),
        ("to score a token", microseconds, lambda value: f"{value:,.0f} µs"),
    )
    for axis, (title, values, label) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, color=[f"C{number}" for number in range(len(names))])
        axis.bar_label(bars, labels=[label(value) for value in values], padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set(title=title, xticks=[])
    axes[1].set(yticks=[])
    _save(figure, path)


def _figure(num_panels: int) -> tuple[Any, list[Any]]:
    # The object interface: no global state, no window system. Imported late, a second that only the last rank pays.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, num_panels, panel + 1) for panel in range(num_panels)]


def _save(figure: Any, path: Path) -> None:
    with publish(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _number(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} %".replace("-", "−")


def _interval(interval: Sequence[float] | None) -> str:
    if interval is None:
        return "–"
    return f"{100 * interval[0]:+.1f} … {100 * interval[1]:+.1f}".replace("-", "−")


def _scaled(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 4.27 M, 17.1 MB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()
