"""Sparse kNN targets → tensors for the training loss: of one batch, and made ready for its chunks.

Shape legend: N rows, E stored teacher entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.maths.sparse_rows import SparseRows


@dataclass(frozen=True, kw_only=True)
class TargetBatch:
    """What the loss takes besides hidden states: `SparseRows` of the teacher as tensors, and labels.

    ``offsets_N1`` int64, ``ids`` int64 [E] (an id may repeat within a row), ``probabilities`` float32 [E]
    (not negative), ``labels_N`` int64, ``row_weights_N`` float32 (0 = ignored with any label; None = all
    1), ``base_log_probabilities_N`` float32, log p_base(label), needed for CE through the mixture.

    The offsets stay on the host, where they bound the chunks without a wait; ``device_offsets_N1`` are the
    same on the device, where they were copied there ahead. ``is_ascending`` says whether ids ascend without
    a repeat within each row; None = not known, and then a GPU sorts them rather than ask.
    """

    offsets_N1: Tensor
    ids: Tensor
    probabilities: Tensor
    labels_N: Tensor
    row_weights_N: Tensor | None = None
    base_log_probabilities_N: Tensor | None = None
    device_offsets_N1: Tensor | None = None
    is_ascending: bool | None = None

    @classmethod
    def from_rows(
        cls,
        rows: SparseRows,
        labels_N: np.ndarray[Any, Any],
        base_log_probabilities_N: np.ndarray[Any, Any] | None = None,
    ) -> TargetBatch:
        """A batch on the host, of rows as shards hold them; the dropped mass plays no part in the loss."""
        logs_N = base_log_probabilities_N
        return cls(
            offsets_N1=torch.from_numpy(rows.offsets),
            ids=torch.from_numpy(rows.ids.astype(np.int64)),
            probabilities=torch.from_numpy(rows.probabilities),
            labels_N=torch.from_numpy(labels_N.astype(np.int64)),
            base_log_probabilities_N=None if logs_N is None else torch.from_numpy(logs_N),
            is_ascending=rows.ids_ascend(),
        )

    @classmethod
    def from_labels(cls, labels_N: Tensor) -> TargetBatch:
        """A batch without a teacher, on the labels' device: the loss is their cross entropy."""
        return cls(
            offsets_N1=torch.zeros(len(labels_N) + 1, dtype=torch.int64),
            ids=labels_N.new_empty(0),
            probabilities=torch.empty(0, device=labels_N.device),
            labels_N=labels_N,
            is_ascending=True,
        )

    def to(self, device: torch.device | str) -> TargetBatch:
        """The same on another device, but for the offsets, which are on both; nothing of pinned memory is
        kept, and nothing waits for its copy."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return TargetBatch(
            offsets_N1=self.offsets_N1.to("cpu", copy=True),
            ids=self.ids.to(device, non_blocking=True),
            probabilities=self.probabilities.to(device, non_blocking=True),
            labels_N=self.labels_N.to(device, non_blocking=True),
            row_weights_N=move(self.row_weights_N),
            base_log_probabilities_N=move(self.base_log_probabilities_N),
            device_offsets_N1=self.offsets_N1.to(device, non_blocking=True),
            is_ascending=self.is_ascending,
        )


@dataclass(frozen=True, kw_only=True)
class PreparedTargets:
    """Targets made ready: ignored rows are harmless, teacher rows scaled, α by row. Offsets are plain
    integers.

    Ids ascend within a row; of an id that repeats one entry has all the mass, the others have none.
    """

    offsets: list[int]
    offsets_N1: Tensor  # the same on the device
    row_of_entry_E: Tensor
    ids_E: Tensor
    teacher_E: Tensor
    teacher_mass_N: Tensor
    alphas_N: Tensor  # 0 where the row is cross entropy alone
    labels_N: Tensor
    weights_N: Tensor
    log_base_N: Tensor | None  # log((1-λ) p_base(label))
    log_lambda: float


def prepare_targets(
    targets: TargetBatch,
    device: torch.device,
    *,
    alpha: float,
    mixture_lambda: float | None,
    renormalize: bool,
    only_helpful: bool = False,
) -> PreparedTargets:
    """See `sparse_loss` for what the arguments mean."""
    num_rows, num_entries = len(targets.labels_N), len(targets.ids)
    offsets_N1 = targets.device_offsets_N1
    if offsets_N1 is None:
        offsets_N1 = targets.offsets_N1.to(device, non_blocking=True)
    row_of_entry_E = torch.repeat_interleave(offsets_N1.diff(), output_size=num_entries)
    teacher_E = targets.probabilities.float()
    mass_N = torch.zeros(num_rows, device=device).index_add_(0, row_of_entry_E, teacher_E)
    if renormalize:
        teacher_E = teacher_E / mass_N.clamp_min(torch.finfo(torch.float32).tiny)[row_of_entry_E]
    has_teacher_N = mass_N > 0
    is_taught_N = has_teacher_N & is_helpful(targets, row_of_entry_E) if only_helpful else has_teacher_N
    weights_N = (
        torch.ones(num_rows, device=device)
        if targets.row_weights_N is None
        else targets.row_weights_N.float()
    )
    ids_E = targets.ids
    if not _is_ascending(targets, row_of_entry_E):
        ids_E, teacher_E = _merge_repeated(row_of_entry_E, ids_E, teacher_E)
    ignored_N = weights_N == 0
    log_base_N = None
    if mixture_lambda is not None and targets.base_log_probabilities_N is not None:
        log_keep = math.log1p(-mixture_lambda) if mixture_lambda < 1 else -math.inf
        log_base_N = (targets.base_log_probabilities_N.float() + log_keep).masked_fill(ignored_N, 0.0)
    return PreparedTargets(
        offsets=targets.offsets_N1.tolist(),
        offsets_N1=offsets_N1,
        row_of_entry_E=row_of_entry_E,
        ids_E=ids_E,
        teacher_E=teacher_E,
        teacher_mass_N=has_teacher_N.float() if renormalize else mass_N,
        alphas_N=is_taught_N.float() * alpha,
        labels_N=targets.labels_N.masked_fill(ignored_N, 0),
        weights_N=weights_N,
        log_base_N=log_base_N,
        log_lambda=0.0 if mixture_lambda is None else math.log(mixture_lambda),
    )


def is_helpful(targets: TargetBatch, row_of_entry_E: Tensor) -> Tensor:
    """bool [N]: whether the teacher gives the label more probability than the base does.

    The teacher's is the stored one, before any renormalization: 0 where the label was truncated.
    """
    assert targets.base_log_probabilities_N is not None
    is_label_E = targets.ids == targets.labels_N[row_of_entry_E]
    teacher_N = torch.zeros(len(targets.labels_N), device=is_label_E.device)
    teacher_N.index_add_(0, row_of_entry_E, targets.probabilities.float() * is_label_E)
    return teacher_N.log() > targets.base_log_probabilities_N.float()


def _is_ascending(targets: TargetBatch, row_of_entry_E: Tensor) -> bool:
    """Whether there is nothing to sort and to merge; where that is not known a CPU looks, and a GPU, which
    would have to be waited for, is taken to have ids in any order."""
    if targets.is_ascending is not None:
        return targets.is_ascending
    ids_E = targets.ids
    if ids_E.device.type != "cpu":
        return False
    ascends_E = (ids_E[1:] > ids_E[:-1]) | (row_of_entry_E[1:] != row_of_entry_E[:-1])
    return bool(ascends_E.all())


def _merge_repeated(row_of_entry_E: Tensor, ids_E: Tensor, teacher_E: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ascending in each row, the mass of a repeated id on the first of its entries and 0 on the
    others."""
    order_E = torch.argsort(ids_E, stable=True)
    order_E = order_E[torch.argsort(row_of_entry_E[order_E], stable=True)]
    ids_E = ids_E[order_E]
    is_first_E = torch.ones_like(ids_E, dtype=torch.bool)
    is_first_E[1:] = (ids_E[1:] != ids_E[:-1]) | (row_of_entry_E[1:] != row_of_entry_E[:-1])
    group_E = is_first_E.cumsum(0) - 1
    sums_E = torch.zeros_like(teacher_E).index_add_(0, group_E, teacher_E[order_E])
    return ids_E, sums_E[group_E] * is_first_E
