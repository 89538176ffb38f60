"""Lines of Markdown: short enough for a page, and broken where nothing is damaged."""

from __future__ import annotations

from mlpmem_ds.benchmarks.quality.markdown import item, paragraph, shell_command


def test_a_long_command_goes_over_several_lines_of_whole_words() -> None:
    general = "--general one_text_of_forty_characters_at_least.txt another_text_of_forty_characters_too.txt"
    words = [general, "--output runs/quality-small", "--page docs/RESULTS.md"]
    assert shell_command("python tools/bench.py quality --preset small", words) == (
        f"python tools/bench.py quality --preset small \\\n    {general} \\\n"
        "    --output runs/quality-small --page docs/RESULTS.md"
    )


def test_prose_is_broken_between_words_only() -> None:
    words = ["a-word-with-hyphens"] * 20 + ["x" * 120]
    lines = paragraph(" ".join(words)).splitlines()
    assert " ".join(lines).split() == words
    assert all(len(line) <= 98 for line in lines[:-1]) and lines[-1] == words[-1]


def test_the_lines_of_an_item_stand_under_its_first() -> None:
    first, *others = item("word " * 40).splitlines()
    assert first.startswith("- word") and others and all(line.startswith("  word") for line in others)
