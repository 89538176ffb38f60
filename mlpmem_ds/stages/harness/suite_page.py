"""Part of `run_lm_eval`: the page of a suite, suites.md: scores, λ of each task, speeds, what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlpmem_ds.formats.suites import SuiteArm, SuiteMetric, Suites, TaskScores
from mlpmem_ds.stages.harness.readers import ALONE
from mlpmem_ds.stages.questions.arms import BASE, MEMORY
from mlpmem_ds.stages.report.table import markdown_table

_NONE = "–"
_BASE_OFF = "**1.00**"
_FEW = 20
"""of so few documents an interval is too narrow; of one it has no width"""
_METRICS = {"acc": "accuracy", "acc_bytes": "accuracy a byte", "acc_mutual_info": "accuracy, DCPMI"}


def page_of(suites: Suites) -> str:
    """The page, in Markdown."""
    parts = [f"# Suites: {', '.join(suites.suites)}", _introduction(suites), _scores(suites)]
    if others := [arm for arm in suites.arms if arm not in (BASE, MEMORY)]:
        parts += ["## Changes of the other arms", _CHANGES, _changes(suites, others)]
    if any(arm == MEMORY for arm in suites.arms):
        parts += ["## λ of each task", _lambdas(suites)]
    if any(task.speeds for task in suites.tasks):
        parts += ["## Speed", _SPEED, _speeds(suites)]
    if cut := _cut(suites):
        parts += ["## Cut off", _CUT, cut]
    parts += ["## Arms", "\n".join(f"- `{name}`: {words}" for name, words in suites.arms.items())]
    if suites.left_out:
        reasons = "\n".join(f"- {name}: {reason}" for name, reason in suites.left_out.items())
        parts += ["## Left out", reasons]
    return "\n\n".join(parts) + "\n"


_CHANGES = "From the base, by the metric by which λ was chosen, with the 95 % interval."
_CUT = "Documents whose prompt is longer than the model reads, so that its beginning was cut off:"
_SPEED = (
    "Mean time from the prompt to the first token, with the search for passages, and tokens a second of whole"
    " answers; of a batch where several are asked at a time."
)


def _introduction(suites: Suites) -> str:
    total = sum(task.reported for task in suites.tasks)
    few = [task.title for task in suites.tasks if task.reported < _FEW]
    return (
        f"Tasks: {len(suites.tasks)}; documents: {total:,}, the half of each task on which"
        " nothing was chosen. *Chance* is what guessing scores: a figure near it says nothing. A change has"
        " its 95 % interval, a paired bootstrap over the documents; where 0 lies inside, other questions of"
        " the kind could turn it round. Scores are in per cent."
        + (f" Fewer than {_FEW} documents, too few for an interval: {', '.join(few)}." if few else "")
    )


def _scores(suites: Suites) -> str:
    """A row a metric, the one by which λ was chosen first; below them the mean of those first rows."""
    others = [arm for arm in suites.arms if arm not in (BASE, MEMORY)]
    has_memory = MEMORY in suites.arms
    header = ["task", "metric", "documents", "chance", BASE]
    header += [MEMORY, "λ", "change (95 %)"] if has_memory else []
    header += [name.replace("_", " ") for name in others]
    rows = []
    for task in suites.tasks:
        for metric in _in_order(task):
            arms = {arm.arm: arm for arm in metric.arms}
            is_first = metric.metric == task.tuned_by
            row = [
                task.title if is_first else "",
                _METRICS.get(metric.metric, metric.metric.replace("_", " ")),
                f"{task.reported}" if is_first else "",
                _percent(metric.chance),
                _percent(arms[BASE].value),
            ]
            if has_memory:
                memory = arms.get(MEMORY)
                row += [_value(memory), _lambda_text(task.lmbda), _change(memory)]
            rows.append([*row, *(_value(arms.get(name)) for name in others)])
    rows.append(_mean_row(suites, header, others, has_memory=has_memory))
    return markdown_table(header, rows)


def _mean_row(suites: Suites, header: Sequence[str], others: Sequence[str], *, has_memory: bool) -> list[str]:
    """The mean over the tasks, of the metric by which λ was chosen; of an arm that has not read all: none."""
    found = [{arm.arm: arm.value for arm in _in_order(task)[0].arms} for task in suites.tasks]

    def mean(arm: str) -> str:
        values = [each[arm] for each in found if arm in each]
        return _percent(sum(values) / len(values)) if len(values) == len(found) else _NONE

    chances = [_in_order(task)[0].chance or 0.0 for task in suites.tasks]
    row = ["**mean**", "", "", _percent(sum(chances) / len(chances)), mean(BASE)]
    row += [mean(MEMORY), "", ""] if has_memory else []
    row += [mean(name) for name in others]
    assert len(row) == len(header)
    return row


def _lambdas(suites: Suites) -> str:
    """The chosen λ, and what the reported half says of its neighbours."""
    off = sum(task.lmbda == 1.0 for task in suites.tasks)
    none = sum(task.lmbda == 0.0 for task in suites.tasks)
    rows = [
        [
            task.title,
            _METRICS.get(task.tuned_by, task.tuned_by),
            _lambda_text(task.lmbda),
            _percent(metric.chance),
            _percent(arms[BASE].value),
            _value(arms.get(MEMORY)),
            _value(arms.get(ALONE)),
            _best_of(metric.curve),
            f"{task.tuning}",
        ]
        for task in suites.tasks
        for metric in _in_order(task)[:1]
        for arms in ({arm.arm: arm for arm in metric.arms},)
    ]
    table = markdown_table(
        ["task", "chosen by", "λ", "chance", "λ = 0", "chosen λ", "λ = 1", "best of the half", "tuning"], rows
    )
    words = (
        "λ is the best of the grid on the tuning half, the smallest of several."
        f" {_BASE_OFF} marks λ = 1, where the base is switched off: {off} of {len(suites.tasks)} tasks;"
        f" λ = 0, where the memory is not used: {none}. *Best of the half* was looked for on the reported"
        " half, and is no result: its distance to the chosen λ's score says how much the choice is worth."
    )
    return f"{words}\n\n{table}"


def _speeds(suites: Suites) -> str:
    rows = [
        [
            task.title if number == 0 else "",
            speed.arm,
            f"{1000 * speed.first_token_seconds:.0f} ms",
            f"{speed.tokens_per_second:.1f}",
        ]
        for task in suites.tasks
        for number, speed in enumerate(task.speeds)
    ]
    return markdown_table(["task", "arm", "first token", "tokens/s"], rows)


def _cut(suites: Suites) -> str:
    return "\n".join(
        f"- {task.title}, {reader}: {count:,} of {task.tuning + task.reported:,}"
        for task in suites.tasks
        for reader, count in task.cut.items()
    )


def _changes(suites: Suites, names: Sequence[str]) -> str:
    """Of the arms whose change the first table has no room for."""
    rows = []
    for task in suites.tasks:
        arms = {arm.arm: arm for arm in _in_order(task)[0].arms}
        rows.append([task.title, *(_change(arms.get(name)) for name in names)])
    return markdown_table(["task", *(name.replace("_", " ") for name in names)], rows)


def _in_order(task: TaskScores) -> list[SuiteMetric]:
    """The metric by which λ was chosen, then the others."""
    return sorted(task.metrics, key=lambda metric: metric.metric != task.tuned_by)


def _lambda_text(lmbda: float | None) -> str:
    if lmbda is None:
        return _NONE
    return _BASE_OFF if lmbda == 1.0 else f"{lmbda:.2f}"


def _change(arm: SuiteArm | None) -> str:
    if arm is None or arm.change is None or arm.interval is None:
        return _NONE
    low, high = arm.interval
    return f"{100 * arm.change:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"


def _best_of(curve: Mapping[str, float]) -> str:
    if not curve:
        return _NONE
    best = max(curve, key=lambda weight: curve[weight])
    return f"{_percent(curve[best])} at {best}"


def _value(arm: SuiteArm | None) -> str:
    return _NONE if arm is None else _percent(arm.value)


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}"
