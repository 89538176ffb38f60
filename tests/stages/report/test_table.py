"""Aligned columns for a terminal."""

from mlpmem_ds.stages.report.table import aligned_columns


def test_columns_stand_under_each_other_without_blanks_at_the_end() -> None:
    assert aligned_columns([["set", "arm"], ["a longer name", ""], ["b", "x"]]) == (
        "set            arm\na longer name\nb              x"
    )
