"""Triton twins for `maths.head_scores` and `models.mixture`: rows of logits → **label log-probabilities,
mixture of two models**.

The mixture takes two launches: 64 rows are too few programs for a GPU, so a row is cut into parts, whose
normalizers the first launch makes and the second joins. The logits are read twice, the second time mostly
from the cache.

Shape legend: C rows, V vocabulary, P parts of a row, J labels a row.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_COLUMNS = 8192
_PART_COLUMNS = 2048
_MAX_PARTS = 128


@triton.jit
def label_rows_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, labels_ptr, result_ptr, vocabulary_size, row_stride, num_labels, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    greatest = -float("inf")
    exp_sum = 0.0
    for start in range(0, vocabulary_size, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = tl.load(logits_ptr + columns, mask=columns < vocabulary_size, other=-float("inf")).to(
            tl.float32
        )
        greater = tl.maximum(tl.maximum(greatest, tl.max(logits, 0)), -3.4e38)  # a block may be all -inf
        exp_sum = exp_sum * tl.exp(greatest - greater) + tl.sum(tl.exp(logits - greater), 0)
        greatest = greater
    log_sum = tl.log(exp_sum)
    for label in range(0, num_labels):
        place = row * num_labels + label
        label_logit = tl.load(logits_ptr + tl.load(labels_ptr + place)).to(tl.float32)
        tl.store(result_ptr + place, label_logit - greatest - log_sum)


def label_rows(logits_CV: Tensor, labels_CJ: Tensor) -> Tensor:
    """log softmax(logits) at the labels, float32 [C, J]; the logits' rows may have gaps between them."""
    num_rows, vocabulary_size = logits_CV.shape
    assert logits_CV.stride(1) == 1
    result_CJ = torch.empty(labels_CJ.shape, dtype=torch.float32, device=logits_CV.device)
    columns = min(_MAX_COLUMNS, triton.next_power_of_2(vocabulary_size))
    with torch.cuda.device_of(logits_CV):
        label_rows_kernel[(num_rows,)](
            logits_CV,
            labels_CJ,
            result_CJ,
            vocabulary_size,
            logits_CV.stride(0),
            labels_CJ.shape[1],
            COLUMNS=columns,
            num_warps=16 if columns >= 4096 else 4,
            enable_fp_fusion=True,
        )
    return result_CJ


@triton.jit
def _part_normalizer(logits_ptr, start, stop, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Greatest logit of [start, stop) and the sum of the exponentials below it; -inf and 0 if all are
    -inf."""
    greatest = -float("inf")
    exp_sum = 0.0
    for first in range(start, stop, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        logits = tl.load(logits_ptr + columns, mask=columns < stop, other=-float("inf")).to(tl.float32)
        greater = tl.maximum(tl.maximum(greatest, tl.max(logits, 0)), -3.4e38)
        exp_sum = exp_sum * tl.exp(greatest - greater) + tl.sum(tl.exp(logits - greater), 0)
        greatest = greater
    return greatest, exp_sum


@triton.jit
def part_normalizers_kernel(  # type: ignore[no-untyped-def]
    base_ptr, memory_ptr, normalizers_ptr, vocabulary_size, part_size, num_parts, COLUMNS: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = part * part_size
    stop = tl.minimum(start + part_size, vocabulary_size)
    base_greatest, base_sum = _part_normalizer(base_ptr + row * vocabulary_size, start, stop, COLUMNS)
    memory_greatest, memory_sum = _part_normalizer(memory_ptr + row * vocabulary_size, start, stop, COLUMNS)
    place = normalizers_ptr + row * 4 * num_parts + part
    tl.store(place, base_greatest)
    tl.store(place + num_parts, base_sum)
    tl.store(place + 2 * num_parts, memory_greatest)
    tl.store(place + 3 * num_parts, memory_sum)


@triton.jit
def _joined(normalizers_ptr, num_parts, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """log Σ exp over a row from the parts' normalizers."""
    parts = tl.arange(0, PARTS)
    greatest = tl.load(normalizers_ptr + parts, mask=parts < num_parts, other=-float("inf"))
    sums = tl.load(normalizers_ptr + num_parts + parts, mask=parts < num_parts, other=0.0)
    most = tl.max(greatest, 0)
    return most + tl.log(tl.sum(sums * tl.exp(greatest - most), 0))


@triton.jit
def mixture_rows_kernel(  # type: ignore[no-untyped-def]
    base_ptr,
    memory_ptr,
    normalizers_ptr,
    log_weights_ptr,
    result_ptr,
    vocabulary_size,
    part_size,
    num_parts,
    log_keep,
    log_take,
    WEIGHT_BY_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    log_base_normalizer = _joined(normalizers_ptr + row * 4 * num_parts, num_parts, PARTS)
    log_memory_normalizer = _joined(normalizers_ptr + (row * 4 + 2) * num_parts, num_parts, PARTS)
    if WEIGHT_BY_ROW:
        log_keep = tl.load(log_weights_ptr + 2 * row)
        log_take = tl.load(log_weights_ptr + 2 * row + 1)
    base_ptr += row * vocabulary_size
    memory_ptr += row * vocabulary_size
    result_ptr += row * vocabulary_size
    start = part * part_size
    stop = tl.minimum(start + part_size, vocabulary_size)
    for first in range(start, stop, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < stop
        base = (
            tl.load(base_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            - log_base_normalizer
            + log_keep
        )
        memory = (
            tl.load(memory_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            - log_memory_normalizer
            + log_take
        )
        greater = tl.maximum(base, memory, propagate_nan=tl.PropagateNan.ALL)
        less = tl.minimum(base, memory, propagate_nan=tl.PropagateNan.ALL) - greater
        less = tl.where(greater == -float("inf"), -float("inf"), less)
        mixture = greater + tl.log(1.0 + tl.exp(less))
        tl.store(result_ptr + columns, mixture.to(result_ptr.dtype.element_ty), mask=inside)


def mixture_rows(base_CV: Tensor, memory_CV: Tensor, lmbda: float | Tensor) -> Tensor:
    """log((1-λ) softmax(base) + λ softmax(memory)), float32 [C, V], from logits of any floating dtype, rows
    without gaps.

    λ is a number between 0 and 1, neither of them, or float64 [C] on the same device.
    """
    num_rows, vocabulary_size = base_CV.shape
    result_CV = torch.empty(num_rows, vocabulary_size, dtype=torch.float32, device=base_CV.device)
    part_size = _PART_COLUMNS * max(1, -(-vocabulary_size // (_PART_COLUMNS * _MAX_PARTS)))
    num_parts = -(-vocabulary_size // part_size)
    normalizers_C4P = torch.empty(num_rows, 4, num_parts, dtype=torch.float32, device=base_CV.device)
    columns = min(_PART_COLUMNS, triton.next_power_of_2(vocabulary_size))
    with torch.cuda.device_of(base_CV):
        part_normalizers_kernel[(num_rows, num_parts)](
            base_CV,
            memory_CV,
            normalizers_C4P,
            vocabulary_size,
            part_size,
            num_parts,
            COLUMNS=columns,
            num_warps=4,
            enable_fp_fusion=True,
        )
    by_row = isinstance(lmbda, Tensor)
    log_weights_C2, log_keep, log_take = normalizers_C4P, 0.0, 0.0
    if isinstance(lmbda, Tensor):
        log_weights_C2 = torch.stack([torch.log1p(-lmbda), torch.log(lmbda)], dim=1).float().contiguous()
    else:
        log_keep, log_take = math.log1p(-lmbda), math.log(lmbda)
    with torch.cuda.device_of(base_CV):
        mixture_rows_kernel[(num_rows, num_parts)](
            base_CV,
            memory_CV,
            normalizers_C4P,
            log_weights_C2,
            result_CV,
            vocabulary_size,
            part_size,
            num_parts,
            log_keep,
            log_take,
            WEIGHT_BY_ROW=by_row,
            COLUMNS=columns,
            PARTS=triton.next_power_of_2(num_parts),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return result_CV
