"""Targets made ready for the loss: who sorts, and what a device has to wait for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.sparse_targets import PreparedTargets, TargetBatch, prepare_targets


class CountedOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_copy = name in ("_to_copy", "copy_") and args[-1].device.type == "cpu"
        self.counts["copy from the host" if is_copy else name] += 1
        return func(*args, **(kwargs or {}))


def make_rows(*ids: list[int]) -> SparseRows:
    counts = np.array([len(row) for row in ids])
    flat = np.array([token for row in ids for token in row], np.int32)
    return SparseRows.from_counts(counts, flat, np.linspace(0.1, 0.9, len(flat), dtype=np.float32))


ASCENDING = make_rows([1, 5, 9], [], [0, 2], [7])
REPEATED = make_rows([1, 5, 5], [], [2, 0], [7])


def prepare(batch: TargetBatch, device: str) -> tuple[PreparedTargets, Counter[str]]:
    with CountedOperations() as operations:
        prepared = prepare_targets(
            batch, torch.device(device), alpha=0.5, mixture_lambda=None, renormalize=True
        )
    return prepared, operations.counts


def make_batch(rows: SparseRows) -> TargetBatch:
    return TargetBatch.from_rows(rows, np.arange(rows.num_rows))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_of_shards_are_not_sorted_and_not_looked_at(device: str) -> None:
    """`meta` stands for a device that would have to be waited for."""
    batch = make_batch(ASCENDING).to(device)
    assert batch.is_ascending and batch.device_offsets_N1.device.type == device
    _, counts = prepare(batch, device)
    assert not {"sort", "argsort", "_local_scalar_dense", "all"} & counts.keys(), counts
    if device == "meta":
        assert not counts["copy from the host"], counts  # the offsets were copied ahead


def test_a_device_sorts_where_nothing_is_known_and_does_not_ask() -> None:
    batch = make_batch(ASCENDING).to("meta")
    _, counts = prepare(dataclasses.replace(batch, is_ascending=None), "meta")
    assert counts["sort"] + counts["argsort"] == 2 and not counts["_local_scalar_dense"]


def test_it_is_the_same_with_and_without_the_word() -> None:
    for rows in (ASCENDING, REPEATED):
        known = make_batch(rows)
        found, _ = prepare(known, "cpu")
        asked, counts = prepare(dataclasses.replace(known, is_ascending=None), "cpu")
        assert counts["_local_scalar_dense"] == 1
        assert torch.equal(found.ids_E, asked.ids_E) and torch.equal(found.teacher_E, asked.teacher_E)
    assert found.ids_E.tolist() == [1, 5, 5, 0, 2, 7]
    assert (found.teacher_E == 0).sum() == 1  # all the mass of the repeated id is on its first entry


@pytest.mark.parametrize(
    ("rows", "ascends"),
    [
        (ASCENDING, True),
        (REPEATED, False),
        (make_rows([2, 1]), False),
        (make_rows([1, 1]), False),
        (make_rows([9], [1], [0]), True),
        (make_rows([], [9], [], [1], []), True),
        (make_rows([], []), True),
        (make_rows(), True),
        (make_rows([3]), True),
    ],
)
def test_ascending_is_within_rows_and_without_repeats(rows: SparseRows, ascends: bool) -> None:
    assert rows.ids_ascend() is ascends
    assert TargetBatch.from_rows(rows, np.zeros(rows.num_rows)).is_ascending is ascends
