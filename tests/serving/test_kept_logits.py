"""Logits that are kept for a history: of the rows that were sampled from, and of no others."""

from __future__ import annotations

import pytest
import torch

from mlpmem_ds.serving import kept_logits
from mlpmem_ds.serving.kept_logits import KeptLogits

SLOTS = torch.tensor([12, 5, 40])
ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
LOGITS = [torch.randn(3, 11, generator=torch.Generator().manual_seed(2 + number)) for number in range(2)]


def kept_of(dtype: torch.dtype = torch.float32) -> KeptLogits:
    kept = KeptLogits()
    kept.expect(SLOTS)
    kept.keep(ROWS.to(dtype), LOGITS)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_found_by_slot_where_the_row_is_the_same(dtype: torch.dtype) -> None:
    kept, rows = kept_of(dtype), ROWS.to(dtype)
    order = torch.tensor([2, 0, 1, 1])
    slots = torch.tensor([40, 12, 5, 6])
    places = kept.places(slots, rows[order])
    assert places.tolist() == [2, 0, 1, -1]
    other = rows[order].clone()
    other[0, 3] += 0.5  # another text has had the slot since
    assert kept.places(slots, other).tolist() == [-1, 0, 1, -1]
    ids = torch.tensor([3, 10, 0])
    expected = torch.stack([each.log_softmax(-1)[order[:3], ids] for each in LOGITS], dim=-1)
    torch.testing.assert_close(kept.log_probabilities(places[:3], ids), expected)


def test_a_row_whose_numbers_look_like_none_is_found() -> None:
    kept, rows = KeptLogits(), ROWS.to(torch.bfloat16)
    rows[1, 2] = torch.nan
    kept.expect(SLOTS)
    kept.keep(rows, LOGITS)
    assert kept.places(SLOTS, rows).tolist() == [0, 1, 2]


def test_rows_that_are_not_those_of_the_step_are_not_kept() -> None:
    kept = kept_of()
    kept.keep(ROWS.flip(0), LOGITS)  # made later in the step, of a prompt
    assert kept.places(SLOTS, ROWS).tolist() == [0, 1, 2]
    kept.expect(SLOTS[:2])
    assert kept.places(SLOTS, ROWS).tolist() == [-1, -1, -1]  # of the step before
    kept.keep(ROWS, LOGITS)
    assert kept.places(SLOTS, ROWS).tolist() == [-1, -1, -1]  # of more requests than are known
    kept.expect(torch.tensor([-1, 5, 40, 7]))
    kept.keep(ROWS, LOGITS)
    assert kept.places(torch.tensor([-1, 5, 40]), ROWS).tolist() == [-1, 1, 2]


def test_no_more_are_kept_than_memory_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_logits, "_BYTES", 2 * 2 * 11 * 4)
    assert kept_of().places(SLOTS, ROWS).tolist() == [0, 1, -1]
    monkeypatch.setattr(kept_logits, "_BYTES", 1)
    assert kept_of().places(SLOTS, ROWS).tolist() == [-1, -1, -1]
