"""Small runs keep their files in one folder; above a thousand of a kind no folder has more."""

from __future__ import annotations

from collections import Counter

import pytest

from mlpmem_ds.core.folders import MAX_FILES, folder_of


def test_up_to_a_thousand_files_lie_together() -> None:
    assert {folder_of(number, MAX_FILES) for number in range(MAX_FILES)} == {""}


@pytest.mark.parametrize("count", [1001, 76_294])
def test_no_folder_has_more_than_a_thousand(count: int) -> None:
    folders = Counter(folder_of(number, count) for number in range(count))
    assert max(folders.values()) <= MAX_FILES and len(folders) == -(-count // MAX_FILES)
    assert folder_of(1000, count) == "0001/"


def test_names_sort_as_numbers_do() -> None:
    assert folder_of(0, 20_000_000) == "00000/" and folder_of(19_999_999, 20_000_000) == "19999/"
