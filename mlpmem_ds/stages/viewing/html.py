"""Part of `view_report` and `generate`: views of tokens and a report's figures → one HTML file.

The page loads nothing: its style, its script (what is shown when a token is pointed at, or reached by the
keyboard) and its pictures are in it. It works in light and dark, and without colours: who was right is also
an underline.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from mlpmem_ds.formats.evaluation import Evaluation
from mlpmem_ds.stages.report.words import interval_text, percent_text
from mlpmem_ds.stages.viewing.token_views import Candidate, Opinion, TokenView

_PAGE = "page.html"
_FIGURES = {
    "lambda.png": "Perplexity on the tuning split over the weight λ; the circles are the choices",
    "wins.png": "What each arm wins and loses, by kind of token",
    "cost.png": "What each arm costs",
}
_KINDS = {
    (True, True): ("both", "both were right"),
    (False, True): ("memory", "only the memory was right"),
    (True, False): ("base", "only the base was right"),
    (False, False): ("none", "neither was right"),
}


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text of the page: what is above it, and its tokens; the first `num_given` were not predicted."""

    title: str
    views: Sequence[TokenView]
    num_given: int = 0


def render_page(
    title: str, passages: Sequence[Passage], *, summary: str = "", details: Sequence[str] = ()
) -> str:
    """The page: a summary, the passages with their legend, details; summary and details are HTML."""
    data = [[_data(view.opinion) for view in passage.views] for passage in passages]
    page = Template(Path(__file__).with_name(_PAGE).read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(title),
        summary=summary,
        details="\n".join(details),
        legend=_legend(),
        passages="\n".join(_passage(number, passage) for number, passage in enumerate(passages)),
        data=_script_json(data),
    )


def report_summary(evaluation: Evaluation) -> str:
    """The result in a sentence, and the table of arms."""
    return f"<p>{escape(_result(evaluation))}</p>{_arms_table(evaluation)}"


def report_details(evaluation: Evaluation, root: Path) -> list[str]:
    """The report's pictures, and wins and losses by kind of token."""
    parts = ["<h2>Figures</h2>"]
    for name, words in _FIGURES.items():
        path = root / name
        if path.is_file():
            content = base64.b64encode(path.read_bytes()).decode()
            parts.append(
                f'<figure><img src="data:image/png;base64,{content}" alt="{escape(words)}">'
                f"<figcaption>{escape(words)}</figcaption></figure>"
            )
    for breakdown in evaluation.breakdowns:
        header = [breakdown.name, "positions", *breakdown.arms]
        rows = [
            [
                label,
                f"{breakdown.positions[number]:,}",
                *(percent_text(figures.ppl_change[number]) for figures in breakdown.arms.values()),
            ]
            for number, label in enumerate(breakdown.labels)
        ]
        parts.append(
            f"<details><summary>Change of perplexity by {escape(breakdown.name)}</summary>"
            f"{_table(header, rows)}</details>"
        )
    return parts


def _result(evaluation: Evaluation) -> str:
    base = evaluation.base
    words = f"Perplexity of the base alone on the {evaluation.test_split} split: {base.ppl:.2f}."
    if evaluation.subject is not None:
        subject = evaluation.arm(evaluation.subject)
        words += (
            f" With the memory {subject.ppl:.2f} ({percent_text(subject.ppl_change)}, 95 % interval"
            f" {interval_text(subject.ppl_interval)}; lower is better)."
        )
    return words


def _arms_table(evaluation: Evaluation) -> str:
    rows = [
        [
            arm.name,
            f"{arm.ppl:.2f}",
            percent_text(arm.ppl_change),
            f"{arm.bits_per_byte:.3f}",
            arm.description,
        ]
        for arm in evaluation.arms
    ]
    return _table(["arm", "perplexity", "change", "bits a byte", "what it is"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _legend() -> str:
    items = "".join(f'<span class="{kind}">{escape(words)}</span>' for kind, words in _KINDS.values())
    return f'<p class="legend">{items}</p>'


def _passage(number: int, passage: Passage) -> str:
    spans = []
    for place, view in enumerate(passage.views):
        shown = escape(view.text).replace("\n", "↵\n")
        if place < passage.num_given:
            spans.append(f'<span class="given">{shown}</span>')
        elif view.opinion is None:
            spans.append(f"<span>{shown}</span>")
        else:
            kind = _KINDS[view.opinion.base_is_right, view.opinion.memory_is_right][0]
            spans.append(f'<span class="{kind}" tabindex="0" data-at="{number},{place}">{shown}</span>')
    return f'<section><h3>{escape(passage.title)}</h3><p class="text">{"".join(spans)}</p></section>'


def _data(opinion: Opinion | None) -> Any:
    """What the script shows of a token; short names, because there are many."""
    if opinion is None:
        return None
    numbers = (opinion.base, opinion.memory, opinion.joint, opinion.weight)
    return {
        "p": [float(f"{value:.4g}") for value in numbers],
        "b": _pairs(opinion.base_top),
        "m": _pairs(opinion.memory_top),
    }


def _pairs(candidates: Sequence[Candidate]) -> list[list[Any]]:
    return [[candidate.text, float(f"{candidate.probability:.3g}")] for candidate in candidates]


def _script_json(data: Any) -> str:
    """JSON that no text in it can end the script with."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
