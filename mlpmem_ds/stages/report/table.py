"""Part of `evaluate`: the table of the arms, for a terminal and for the page, and what each column means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlpmem_ds.formats.evaluation import ArmFigures, Evaluation
from mlpmem_ds.stages.report.breakdowns import CALIBRATION_BINS
from mlpmem_ds.stages.report.words import interval_text, number_text, percent_text, scaled_text


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table."""

    title: str
    meaning: str
    """for the page; no capital at its start, no full stop at its end"""
    cell: Callable[[ArmFigures], str]


def columns(evaluation: Evaluation) -> list[Column]:
    """All columns, in their order; the first names the arm."""
    return [
        Column(
            title="arm",
            meaning="the way to predict that this line is about, as described above",
            cell=lambda arm: arm.name,
        ),
        *_quality_columns(evaluation),
        *_price_columns(evaluation),
    ]


def _quality_columns(evaluation: Evaluation) -> list[Column]:
    settings = evaluation.settings
    return [
        Column(
            title="test ppl",
            meaning=(
                f"perplexity on the {evaluation.test_split} split: the number of equally likely tokens among"
                " which it would be as hard to guess. Lower is better; 1 would be a perfect prediction"
            ),
            cell=lambda arm: f"{arm.ppl:.2f}",
        ),
        Column(
            title="change",
            meaning=f"of that perplexity, against `{evaluation.base.name}`; negative is better",
            cell=lambda arm: percent_text(arm.ppl_change),
        ),
        Column(
            title="95 % interval",
            meaning=(
                "of the change, in per cent, by a paired bootstrap: the text is drawn again"
                f" {settings.bootstrap_samples:,} times, in blocks of {settings.bootstrap_block} positions,"
                " the same for both arms. If it does not contain 0, other text of this kind would hardly turn"
                " the result round"
            ),
            cell=lambda arm: interval_text(arm.ppl_interval),
        ),
        *(_split_column(split) for split in evaluation.extra_splits),
        Column(
            title="bits/byte",
            meaning=(
                "bits spent on all positions, end-of-document tokens too, by UTF-8 byte of the text. Unlike"
                " perplexity it can be compared between vocabularies"
            ),
            cell=lambda arm: f"{arm.bits_per_byte:.3f}",
        ),
        Column(
            title="ECE",
            meaning=(
                "expected calibration error: by how much the probability of a guessed token differs from how"
                f" often the guess is right, on average over {CALIBRATION_BINS} bins of equal width; 0 is"
                " perfect. The guess is the arm's likeliest token; for arms named `base+…` it is the base's,"
                " with the probability that the mixture gives it, so that they are judged on the same guesses"
            ),
            cell=lambda arm: f"{arm.calibration.error:.3f}",
        ),
        Column(
            title="λ",
            meaning=(
                "weight in the mixture with the base; ~ before the mean where a gate gives another at each"
                " token; – for an arm that stands alone"
            ),
            cell=lambda arm: _lambda_text(arm, evaluation.test_split),
        ),
        Column(
            title="wins",
            meaning=(
                "share of the positions at which what is mixed in, by itself (or the control), gives the true"
                " token more probability than the base does. Below 0.5 is common: a mixture gains where it"
                " wins by much"
            ),
            cell=lambda arm: number_text(arm.win_rate, "{:.2f}"),
        ),
    ]


def _lambda_text(arm: ArmFigures, split: str) -> str:
    if arm.lmbda is None and arm.weights is not None:
        return f"~{arm.weights[split].mean:.2f}"
    return number_text(arm.lmbda, "{:.2f}")


def _split_column(split: str) -> Column:
    return Column(
        title=f"{split} ppl",
        meaning=f"perplexity on the {split} split",
        cell=lambda arm: f"{arm.splits[split].ppl:.2f}",
    )


def _price_columns(evaluation: Evaluation) -> list[Column]:
    settings, base = evaluation.settings, evaluation.base.name
    return [
        Column(
            title="parameters",
            meaning="numbers that were trained, the base's included",
            cell=lambda arm: scaled_text(arm.parameters),
        ),
        Column(
            title="on disk",
            meaning=(
                "bytes that the arm needs: weights and configuration; for a search stored keys, values, index"
            ),
            cell=lambda arm: scaled_text(arm.bytes, "B"),
        ),
        Column(
            title="tokens read",
            meaning=(
                "to make the arm, beyond the base, each time that they were read: positions of its training's"
                " steps, or stored keys; – where it is not known"
            ),
            cell=lambda arm: "–" if arm.tokens is None else scaled_text(arm.tokens),
        ),
        Column(
            title="made in",
            meaning=(
                "wall-clock seconds of the stages that the arm needs and the base does not, from their logs;"
                " – where one of them or its log was not found"
            ),
            cell=lambda arm: "–" if arm.name == base else number_text(arm.seconds, "{:.0f} s"),
        ),
        Column(
            title="tokens/s",
            meaning=(
                "scored here, the base's pass and the arm's own part, median over blocks of the"
                f" {evaluation.test_split} split ({settings.device}; threads of a process:"
                f" {settings.threads}, cores of the machine: {evaluation.machine.cores or 'not known'})"
            ),
            cell=lambda arm: f"{arm.tokens_per_second:,.0f}",
        ),
    ]


def render_table(evaluation: Evaluation) -> str:
    """The table as aligned plain text, for a terminal."""
    header, rows = _cells(evaluation)
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    share = evaluation.recovered_share
    note = (
        []
        if share is None
        else [f"the memory's gain is {share:.0%} of that of an exact search over all the keys"]
    )
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *note])


def aligned_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as plain text, every column to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown_of_arms(evaluation: Evaluation) -> str:
    """The table for the page."""
    return markdown_table(*_cells(evaluation))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)
    )


def _cells(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    shown = columns(evaluation)
    return (
        [column.title for column in shown],
        [[column.cell(arm) for column in shown] for arm in evaluation.arms],
    )
