"""The page from made-up results: claims, all presets, lines that a page may have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlpmem_ds.benchmarks.quality.arms import ENSEMBLE_GATE
from mlpmem_ds.benchmarks.quality.page import publish_page, render_page

from .conftest import in_one_line, make_result


def _goals(page: str) -> dict[str, str]:
    """Of the table of goals: what a ratio means → its line."""
    lines = page[page.index("| quotient |") : page.index("## Preset")].splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def test_the_page_says_what_holds_what_does_not_and_what_cannot_be_said() -> None:
    lines = _goals(render_page([make_result()]))
    assert lines["quotient"].endswith("| goal | tiny: domain |")
    assert lines["what recovered_share means"].endswith("| at least 1 | **1.500** |")
    assert lines["what memory_ppl_over_continued_training means"].endswith(" ✗ |")
    assert lines["what memory_gain_over_ce_only_gain means"].endswith(" ? |")


def test_a_claim_of_one_seed_says_so_and_its_interval_covers_documents_alone() -> None:
    result = make_result()
    alone = [replace(ratio, by_seed=ratio.by_seed[:1]) for ratio in result.ratios]
    page = render_page([replace(result, seeds=(0,), ratios=tuple(alone))])
    assert "| tiny, one seed: domain |" in page
    assert "differed by; of one seed it covers the documents alone" in in_one_line(page)


def test_a_ratio_without_a_value_has_a_dash_and_the_reason_stands_above() -> None:
    result = make_result()
    ratio = replace(result.ratios[0], value=None, interval=None, by_seed=(None, 1.5), is_clear=False)
    page = render_page([replace(result, ratios=(ratio,))])
    assert _goals(page)[f"what {ratio.name} means"].endswith("| at least 1 | – |")
    assert "–: it has no value, for what it is a share of gained nothing" in in_one_line(page)
    assert f"| what {ratio.name} means (`{ratio.name}`) | domain | – | – | – 1.500 |" in page


def test_the_overview_has_a_line_a_text_with_the_changes_against_the_base() -> None:
    page = in_one_line(render_page([make_result()]))
    assert "| tiny: a manual | 20.00 | 18.00 (−10.0 %) | 17.00 (−15.0 %) | 16.00 (−20.0 %) |" in page


def test_the_overview_has_a_second_model_under_a_gate() -> None:
    result = make_result()
    (text,) = result.texts
    gated = replace(text.rows[3], arm=ENSEMBLE_GATE, ppl=15.0, change=-0.25, other_change=-0.01)
    page = in_one_line(render_page([replace(result, texts=(replace(text, rows=(*text.rows, gated)),))]))
    assert "| 16.00 (−20.0 %) | 15.00 (−25.0 %) |" in page and "| +30.0 % | −1.0 % |" in page


def test_a_preset_without_a_memory_has_dashes_in_the_overview() -> None:
    result = make_result()
    (text,) = result.texts
    bare = replace(text, rows=(text.rows[0], text.rows[3]))
    page = in_one_line(render_page([replace(result, texts=(bare,), ratios=())]))
    assert "| tiny: a manual | 20.00 | – | – | 16.00 (−20.0 %) | – | – | +30.0 % | – |" in page
    assert "Better than" not in page


def test_lines_have_a_hundred_characters_at_most_but_those_of_tables() -> None:
    for line in render_page([make_result()]).splitlines():
        assert len(line) <= 100 or line.startswith("|"), line


def test_results_of_several_days_stand_on_one_page(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    publish_page(page, make_result("tiny"))
    publish_page(page, make_result("real", date="2026-02-03"))
    text = page.read_text()
    assert text.index("## Preset real") < text.index("## Preset tiny")
    assert "2026-01-02" in text and "2026-02-03" in text
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        *("real.json", "real.png", "tiny.json", "tiny.png")
    ]
    publish_page(page, make_result("tiny", date="2026-03-04"))
    assert "2026-01-02" not in page.read_text() and "2026-02-03" in page.read_text()


def test_the_commands_are_those_of_the_runs() -> None:
    result = make_result("real", seeds=tuple(range(5)), settings={"preset": "real", "base": "smollm2"})
    assert "--preset real --base smollm2 --seeds 5" in render_page([result])


def test_a_long_command_goes_over_several_lines_of_whole_words() -> None:
    general = "one_text_of_forty_characters_at_least.txt another_text_of_forty_characters_too.txt"
    page = render_page([make_result("small", settings={"preset": "small", "general": general})])
    assert (
        f"python tools/bench.py quality --preset small \\\n    --general {general} \\\n"
        "    --output runs/quality-small --page docs/RESULTS.md\n"
    ) in page


def test_a_ratio_of_several_presets_has_one_line_with_a_value_of_each() -> None:
    tiny = make_result("tiny")
    lines = _goals(render_page([tiny, make_result("small", ratios=tiny.ratios[:1])]))
    assert lines["quotient"].endswith("| small: domain | tiny: domain |")
    assert lines["what recovered_share means"].endswith("| **1.500** | **1.500** |")
    assert lines["what memory_ppl_over_continued_training means"].count("|  |") == 1
