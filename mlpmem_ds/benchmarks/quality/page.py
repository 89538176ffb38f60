"""Part of `quality`: the results of all presets → docs/RESULTS.md, for a sceptic who has three minutes.

The page is made anew from the JSON files in the folder `results` next to it, so that runs of different days
stand on one page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from mlpmem_ds.benchmarks.quality.arms import BASE, BEST_MEMORIES, CONTINUED, ENSEMBLE_GATE, KNN
from mlpmem_ds.benchmarks.quality.markdown import item, paragraph, shell_command
from mlpmem_ds.benchmarks.quality.plots import plot_changes
from mlpmem_ds.benchmarks.quality.preset_section import preset_section
from mlpmem_ds.benchmarks.quality.results import (
    ArmRow,
    QualityResult,
    RatioResult,
    read_result,
    write_result,
)
from mlpmem_ds.benchmarks.scaling.results import (
    ScalingResult,
    bases_at_their_best,
    plot_scaling,
    read_scaling,
    scaling_table,
    write_scaling,
)
from mlpmem_ds.benchmarks.sweep.results import (
    SweepResult,
    plot_sweep,
    read_sweep,
    sweep_table,
    write_sweep,
)
from mlpmem_ds.core.files import publish_bytes
from mlpmem_ds.stages.report.table import markdown_table
from mlpmem_ds.stages.report.words import number_text, percent_text

_ORDER = ("real", "small", "tiny")
_FOLDER, _SCALING, _SWEEP = "results", "scaling", "sweep"
Result = TypeVar("Result")


def publish_page(page: Path, result: QualityResult) -> None:
    """Keep this result next to the page, in place of the preset's former one, and write the page anew."""
    _publish(page, result.preset, result, write_result, plot_changes)


def publish_scaling(page: Path, result: ScalingResult) -> None:
    """The same with a result of fit_scaling."""
    _publish(page, _SCALING, result, write_scaling, plot_scaling)


def publish_sweep(page: Path, result: SweepResult) -> None:
    """The same with a result of `bench sweep`."""
    _publish(page, _SWEEP, result, write_sweep, plot_sweep)


def _publish(
    page: Path,
    name: str,
    result: Result,
    write: Callable[[Path, Result], None],
    plot: Callable[[Result, Path], None],
) -> None:
    folder = page.parent / _FOLDER
    folder.mkdir(exist_ok=True)
    write(folder / f"{name}.json", result)
    plot(result, folder / f"{name}.png")
    _write_page(page)


def _write_page(page: Path) -> None:
    places = {path.stem: path for path in sorted((page.parent / _FOLDER).glob("*.json"))}
    scaling, sweep = places.pop(_SCALING, None), places.pop(_SWEEP, None)
    text = render_page(
        [read_result(path) for path in places.values()],
        None if scaling is None else read_scaling(scaling),
        None if sweep is None else read_sweep(sweep),
    )
    publish_bytes(page, text.encode())


def render_page(
    results: Sequence[QualityResult],
    scaling: ScalingResult | None = None,
    sweep: SweepResult | None = None,
) -> str:
    """The page: in short, a section a preset, when what wins, scaling, how it was measured, how to rerun."""
    results = sorted(results, key=lambda result: _rank(result.preset))
    parts = [
        "# Results: is the memory worth its parameters?",
        paragraph(
            "Written by `tools/bench.py quality`, from the JSON files in `docs/results/`; not by hand. Every"
            " number is of text that no arm was trained on, everything that is chosen (λ, temperature,"
            " neighbours, gate, epochs) was chosen on other text, and arms that beat the memory are in the"
            " same tables."
        ),
        paragraph(
            "A preset has two texts: *general*, of the kind that the base knows, and *domain*, which is new"
            " to it. What is trained on the domain should help there, and leave the general text as it was:"
            " the columns *other text*."
        ),
        "## In three minutes",
        _overview(results),
        paragraph(
            "*Memory*: with its gate, which was fitted to other documents of both texts; the fine-tuned base"
            " has seen nothing of the other text, and the search has one λ for all tokens. *Both gated*: the"
            " base and the fine-tuned base (where there is none, a decoder of the size of base and memory)"
            " under a gate of the same kind, at the cost of a whole second model at every token."
        ),
        *_goals(results),
        *(
            part
            for result in results
            for part in preset_section(result, plot=f"{_FOLDER}/{result.preset}.png")
        ),
        *([] if sweep is None else _sweep_section(sweep)),
        *([] if scaling is None else _scaling_section(scaling)),
        *_method(),
        *_rerun(results),
    ]
    return "\n\n".join(parts) + "\n"


def _rank(preset: str) -> int:
    return _ORDER.index(preset) if preset in _ORDER else len(_ORDER)


def _overview(results: Iterable[QualityResult]) -> str:
    """A line a preset and text."""
    header = [
        "preset, text",
        "base",
        "kNN-LM",
        "memory",
        "fine-tuned base",
        "both gated",
        "other text: memory",
        "other text: fine-tuned",
        "other text: both gated",
    ]
    lines = []
    for result in results:
        for text in result.texts:
            rows = {row.arm: row for row in text.rows}
            memory = next((rows[arm] for arm in BEST_MEMORIES if arm in rows), None)
            others = [memory, rows.get(CONTINUED), rows.get(ENSEMBLE_GATE)]
            lines.append(
                [
                    f"{result.preset}: {text.title}",
                    f"{rows[BASE].ppl:.2f}",
                    _change_text(rows.get(KNN)),
                    *map(_change_text, others),
                    *(percent_text(None if row is None else row.other_change) for row in others),
                ]
            )
    return markdown_table(header, lines)


def _change_text(row: ArmRow | None) -> str:
    return "–" if row is None else f"{row.ppl:.2f} ({percent_text(row.change)})"


def _goals(results: Sequence[QualityResult]) -> list[str]:
    """Every ratio with its goal and what each preset found for it, in one table."""
    places = [(result, text) for result in results for text in _texts_of_ratios(result)]
    found = {(ratio.name, result.preset, ratio.text): ratio for result in results for ratio in result.ratios}
    first: dict[str, RatioResult] = {}  # by name: each preset has it with the same meaning and goal
    for (name, _, _), ratio in found.items():
        first.setdefault(name, ratio)
    header = [
        "quotient",
        "goal",
        *(f"{result.preset}{_seeds_text(result)}: {text}" for result, text in places),
    ]
    lines = [
        [
            ratio.meaning,
            ratio.goal,
            *(_verdict(found.get((name, result.preset, text))) for result, text in places),
        ]
        for name, ratio in first.items()
    ]
    return [
        paragraph(
            "The goals of the project, and what was found. **Bold**: the goal is met, and so it is in the"
            " whole 95 % interval. ✗: missed in the whole interval. ?: not decided, the goal lies in the"
            " interval. –: it has no value, for what it is a share of gained nothing. The intervals stand"
            " below, at each preset."
        ),
        markdown_table(header, lines),
    ]


def _texts_of_ratios(result: QualityResult) -> list[str]:
    return list(dict.fromkeys(ratio.text for ratio in result.ratios))


def _seeds_text(result: QualityResult) -> str:
    return ", one seed" if len(result.seeds) == 1 else ""


def _verdict(ratio: RatioResult | None) -> str:
    """The value, with whether the goal is met; empty where the preset does not have it."""
    if ratio is None:
        return ""
    value = number_text(ratio.value, "{:.3f}")
    if ratio.value is None:
        return value
    if not ratio.is_clear:
        return f"{value} ?"
    return f"**{value}**" if ratio.is_met else f"{value} ✗"


def _sweep_section(sweep: SweepResult) -> list[str]:
    tested = (
        "MB are of text to learn from; tuning and test text are the same in all lines."
        if sweep.has_one_test_text
        else "MB are of all splits: tuning and test text are shares of them, so lines of different MB are"
        " tested on different texts, and part of what differs between them is the text."
    )
    return [
        "## When: epochs, size of the text, quality of the base",
        paragraph(
            f"Base: {sweep.base}, on {sweep.general}; domain: {sweep.domain}. One thing is varied at a time"
            f" around the first line; {sweep.seeds} seed{'s' * (sweep.seeds > 1)} (the points), on"
            f" {sweep.machine}, {sweep.date}. All arms of a line train for the same epochs and keep their"
            f" best weights; λ is the best fixed one, without a gate. {tested} In bold: the best arm of a"
            " line. `python tools/bench.py sweep` measures it anew; sweep.json has the intervals."
        ),
        f"![change of perplexity over epochs, text and base]({_FOLDER}/sweep.png)",
        sweep_table(sweep),
    ]


def _scaling_section(scaling: ScalingResult) -> list[str]:
    return [
        "## Parameters and compute: decoder alone, decoder with memory",
        paragraph(
            f"Power laws of the loss in nats (log perplexity), on {scaling.text}; {scaling.machine},"
            f" {scaling.date}. Held equal: {scaling.held_equal}. Compute is counted: 6 operations a parameter"
            " and learnt token, 2 where a model only reads, 4 of a head that is learnt through and stays as"
            " it is, and the products of the retriever's search. Intervals are over draws of whole documents"
            f" ({scaling.documents} of them) and cover neither seeds nor other sizes; with so few sizes an"
            f" exponent describes them, and is no law. {bases_at_their_best(scaling)}"
        ),
        f"![perplexity over parameters and compute]({_FOLDER}/scaling.png)",
        scaling_table(scaling),
    ]


def _method() -> list[str]:
    return [
        "## How it was measured",
        "\n".join(
            map(
                item,
                (
                    "**Perplexity** is exp of the mean over seeds of the nats a token; bits per byte count"
                    " the bytes of the text, so that vocabularies compare.",
                    "**Intervals.** Within a seed, whole documents are drawn again 2,000 times, the same ones"
                    " for both arms; the 2.5 and 97.5 percentiles are that seed's interval. The interval that"
                    " stands here reaches from the lowest end of any seed to the highest. So it covers other"
                    " documents of the kind, and what the trainings differed by; of one seed it covers the"
                    " documents alone. The base is one: it does not cover another base.",
                    "**Seeds** change the initial weights and the order of each trained arm. The base, the"
                    " keys, the index and the targets are made once.",
                    "**Equal.** All memories of a preset have the same blocks and batches; how much they read"
                    " is in the column *M tokens*. Those of the published recipe have the epochs and the rate"
                    " of the preset, for its own rate is that of a billion parameters. Models that are"
                    " trained instead stop when their tuning perplexity no longer falls, and at the latest"
                    " after the preset's epochs, `bigger`, which starts at random, after those of base and"
                    " memory together (where its description says the preset's, it read the text less often"
                    " than the base); a line under the table names those that were at their best"
                    " at their last step, or says that this was not recorded. Where the base was trained"
                    " here, it is trained on at the learning rate of its own training, and `lora` at the best"
                    " of three rates on `tiny`; `continued_equal_time` gets the seconds of keys, index,"
                    " targets and memory together, at a constant rate, for how many steps fit is not known"
                    " beforehand; `lora` and `bigger` get as many parameters as the memory. All keep the"
                    " weights of their best validation on the tuning split. What is not equal stands in the"
                    " last columns: parameters with the base's, tokens read and seconds spent beyond the"
                    " base, on a machine that runs several jobs at once."
                    " Within a preset all have one precision: float32; where `--dtype bfloat16` stands in its"
                    " command, bfloat16 where a model is only read, and bfloat16 products over float32"
                    " weights where one is trained (unless `--ds_config` stands there).",
                    "**The gate** is fitted to the tuning splits of both texts; the fixed λ to that of the"
                    " arm's own text. The column *other text* keeps both as they are.",
                    "**Memories of the recommended recipe** read the final norm's output after a third, two"
                    " thirds and all of the layers; those of the published recipe read the input of the MLP"
                    " at .7 of the depth.",
                    "**Documents.** Long ones of the presets' own texts are shortened to their beginnings, so"
                    " that no document is in two splits.",
                    "**ECE** is the expected calibration error of the base's likeliest token (of a model that"
                    " stands alone, of its own).",
                    "**Gains** in ratios are differences of perplexity from the base.",
                ),
            )
        ),
    ]


def _rerun(results: Sequence[QualityResult]) -> list[str]:
    lines = []
    for preset in ("tiny", "small", "real"):
        found = next((result for result in results if result.preset == preset), None)
        flags = {} if found is None else _flags_of(found)
        if preset == "real":
            flags.setdefault("base", "DIR")
        words = [f"--{name} {value}" for name, value in flags.items()]
        words += [f"--output runs/quality-{preset}", "--page docs/RESULTS.md"]
        lines.append(shell_command(f"python tools/bench.py quality --preset {preset}", words))
    return [
        "## How to rerun it",
        "```bash\n" + "\n".join(lines) + "\n```",
        paragraph(
            "A preset's section says how many minutes of jobs it took; on two cores two jobs ran at once."
            " Interrupted, the same command continues. Files that a command names are those of that run ([how"
            " ours were made](LAB.md#quality-real)): `smollm2` is what `tools/fetch_base.py --output smollm2`"
            " makes; the general text of `real` is not published, so give one of yours. `quality.json`"
            " in the output has all numbers of this page, by seed. A recipe may have changed since a preset's"
            " date; its arms say what was trained."
        ),
    ]


def _flags_of(result: QualityResult) -> dict[str, str]:
    """Of its run, without --preset and without defaults of the seeds."""
    flags = {name: value for name, value in result.settings.items() if name != "preset"}
    if len(result.seeds) != 3:
        flags["seeds"] = str(len(result.seeds))
    if result.seeds[0] != 0:
        flags["first-seed"] = str(result.seeds[0])
    return flags
