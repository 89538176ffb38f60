"""Part of `quality`: the section of one preset in docs/RESULTS.md, with its tables."""

from __future__ import annotations

from collections.abc import Sequence

from mlpmem_ds.benchmarks.quality.arms import BEST_MEMORIES, MODELS
from mlpmem_ds.benchmarks.quality.markdown import item, paragraph
from mlpmem_ds.benchmarks.quality.results import QualityResult, RatioResult, TextResult
from mlpmem_ds.formats.answers import SetScores
from mlpmem_ds.stages.report.table import markdown_table
from mlpmem_ds.stages.report.words import interval_text, number_text, percent_text

_FEW_DOCUMENTS = 20  # below it a bootstrap over documents is too narrow


def preset_section(result: QualityResult, *, plot: str) -> list[str]:
    """The section's blocks of Markdown: its texts, arms, ratios and questions.

    Args:
        result: of one preset.
        plot: the figure of its changes, relative to the page.
    """
    seeds = len(result.seeds)
    minutes = sum(result.job_seconds.values()) / 60
    parts = [
        f"## Preset {result.preset}",
        paragraph(
            f"Base: {result.base}. {seeds} seed{'s' * (seeds > 1)} of every trained arm, on"
            f" {result.machine}, {result.date}; {minutes:,.0f} minutes of jobs in all."
        ),
        f"![change of perplexity by arm]({plot})",
    ]
    for text in result.texts:
        parts += _text_section(text)
    rows = {row.arm: row for text in result.texts for row in text.rows}
    parts += ["### The arms", "\n".join(item(f"`{row.arm}`: {row.description}") for row in rows.values())]
    if result.left_out:
        named = ", ".join(f"`{arm}` ({MODELS[arm].package})" for arm in result.left_out)
        parts.append(paragraph(f"Left out, because a package was not installed: {named}."))
    parts += ["### Ratios", _ratio_table(result.ratios)]
    if result.questions:
        parts += ["### Questions", *_questions(result.questions)]
    return parts


def _text_section(text: TextResult) -> list[str]:
    tested = (
        f"{text.positions.get('train', 0):,} tokens to learn from, {text.positions.get('tuning', 0):,} to"
        f" choose on, {text.positions['test']:,} in {text.documents} documents to test on."
    )
    if text.documents < _FEW_DOCUMENTS:
        tested += f" Fewer than {_FEW_DOCUMENTS} documents: take the intervals for no more than a hint."
    if text.other is not None:
        tested += f" The column *other text* is {text.other}, at the choices made here."
    return [
        f"### {text.name.capitalize()} text: {text.title}",
        paragraph(tested),
        _table(text),
        *_better_than_memory(text),
        *_epochs_used_up(text),
    ]


def _table(text: TextResult) -> str:
    header = [
        "arm",
        "ppl",
        "change",
        "95 % interval",
        "bits/byte",
        "ECE",
        "λ",
        "other text",
        "M params",
        "M tokens",
        "s",
    ]
    lines = [
        [
            f"`{row.arm}`",
            f"{row.ppl:.2f}" if row.ppl < 1000 else f"{row.ppl:,.0f}",
            percent_text(row.change),
            interval_text(row.interval),
            f"{row.bits_per_byte:.3f}",
            f"{row.calibration_error:.3f}",
            " ".join(f"{lmbda:g}" for lmbda in dict.fromkeys(row.lambdas)) or "–",
            percent_text(row.other_change),
            f"{row.parameters / 1e6:.1f}",
            "–" if row.tokens is None else f"{row.tokens / 1e6:.2f}",
            "–" if row.seconds is None else f"{row.seconds:,.0f}",
        ]
        for row in text.rows
    ]
    return markdown_table(header, lines)


def _better_than_memory(text: TextResult) -> list[str]:
    """The arms of the table to which the memory loses, by name."""
    rows = {row.arm: row for row in text.rows}
    memory = next((rows[arm] for arm in BEST_MEMORIES if arm in rows), None)
    if memory is None:
        return []
    better = [row for row in text.rows if row.ppl < memory.ppl and row.arm not in BEST_MEMORIES]
    named = ", ".join(f"`{row.arm}` ({row.ppl:.2f})" for row in better)
    return [paragraph(f"Better than `{memory.arm}` ({memory.ppl:.2f}) on this text: {named or 'no arm'}.")]


def _epochs_used_up(text: TextResult) -> list[str]:
    """The models that more epochs might have made better, by name, and those of which it is not known."""
    named = [
        f"`{row.arm}` ({' '.join(f'{epochs:g}' for epochs in dict.fromkeys(row.epochs_used_up))} epochs,"
        f" {len(row.epochs_used_up)} of {row.seeds} seeds)"
        for row in text.rows
        if row.epochs_used_up
    ]
    unknown = [
        f"`{row.arm}`"
        for row in text.rows
        if row.epochs_used_up is None and row.arm in MODELS and not MODELS[row.arm].is_of_equal_time
    ]
    lines = [
        ("At their best at the last step of their epochs, so not yet at an end", named),
        ("Not recorded whether more epochs might have made these better", unknown),
    ]
    return [paragraph(f"{what}: {', '.join(arms)}.") for what, arms in lines if arms]


def _questions(sets: Sequence[SetScores]) -> list[str]:
    """A line an arm and set, of the set's first metric."""
    lines = []
    for asked in sets:
        for arm in asked.arms:
            metric = next(iter(arm.scores))
            change, interval = arm.changes.get(metric), arm.intervals.get(metric)
            first = arm.first_token_seconds
            lines.append(
                [
                    f"{asked.name} ({asked.questions})",
                    f"`{arm.arm}`",
                    metric,
                    f"{100 * arm.scores[metric]:.1f}",
                    "–" if change is None else f"{100 * change:+.1f}".replace("-", "−"),
                    interval_text(interval),
                    "–" if first is None else f"{first:.2f}",
                    "–" if arm.tokens_per_second is None else f"{arm.tokens_per_second:.1f}",
                ]
            )
    header = ["set", "arm", "metric", "%", "change", "95 % interval", "s to first token", "tokens/s"]
    return [
        paragraph(
            "The first seed's memory under its gate. Changes are percentage points against"
            " the base, intervals over questions; `base+rag` reads five passages of the domain text (BM25)."
        ),
        markdown_table(header, lines),
    ]


def _ratio_table(ratios: Sequence[RatioResult]) -> str:
    lines = [
        [
            f"{ratio.meaning} (`{ratio.name}`)",
            ratio.text,
            number_text(ratio.value, "{:.3f}"),
            "–" if ratio.interval is None else f"{ratio.interval[0]:.3f} … {ratio.interval[1]:.3f}",
            " ".join(number_text(value, "{:.3f}") for value in ratio.by_seed),
            ratio.goal,
            ("yes" if ratio.is_met else "no") + ("" if ratio.is_clear else ", not clear"),
        ]
        for ratio in ratios
    ]
    return markdown_table(["ratio", "text", "value", "95 % interval", "by seed", "goal", "met"], lines)
