"""Triton twin of the row work in `maths.sparse_loss`: logits of a chunk → **KL, CE and the logits' gradient,
one launch**.

A program takes a row: one pass over its logits for their normalizer, one that writes s·softmax(z) - m. Where
m is not 0 the value is written from float32 in one rounding, not read back, subtracted and rounded again
(that cancels; measured 3.5e-3 relative in bfloat16 where this has 2.8e-3).

Shape legend: C rows of a chunk, V vocabulary, E stored teacher entries of all rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_COLUMNS = 8192
_ENTRIES = 128


@triton.jit
def sparse_rows_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    d_logits_ptr,
    offsets_ptr,
    ids_ptr,
    teacher_ptr,
    teacher_mass_ptr,
    alphas_ptr,
    labels_ptr,
    weights_ptr,
    log_base_ptr,
    kl_ptr,
    ce_ptr,
    vocabulary_size,
    row_stride,
    log_lambda,
    THROUGH_MIXTURE: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    d_logits_ptr += row * row_stride
    greatest = -float("inf")
    exp_sum = 0.0
    for start in range(0, vocabulary_size, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = tl.load(logits_ptr + columns, mask=columns < vocabulary_size, other=-float("inf")).to(
            tl.float32
        )
        greater = tl.maximum(greatest, tl.max(logits, 0))
        exp_sum = exp_sum * tl.exp(greatest - greater) + tl.sum(tl.exp(logits - greater), 0)
        greatest = greater
    log_normalizer = greatest + tl.log(exp_sum)

    weight = tl.load(weights_ptr + row)
    alpha = tl.load(alphas_ptr + row)
    label = tl.load(labels_ptr + row)
    label_logit = tl.load(logits_ptr + label).to(tl.float32)
    label_mass = 1.0 - alpha
    log_prediction = label_logit - log_normalizer
    if THROUGH_MIXTURE:
        log_base = tl.load(log_base_ptr + row)
        log_memory = log_prediction + log_lambda
        greater = tl.maximum(log_base, log_memory, propagate_nan=tl.PropagateNan.ALL)
        less = tl.minimum(log_base, log_memory, propagate_nan=tl.PropagateNan.ALL)
        log_prediction = greater + tl.log(1.0 + tl.exp(less - greater))
        label_mass *= tl.exp(log_memory - log_prediction)

    first = tl.load(offsets_ptr + row)
    last = tl.load(offsets_ptr + row + 1)
    kl = 0.0
    for start in range(first, last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        teacher = tl.load(teacher_ptr + entries, mask=entries < last, other=0.0)
        counts = teacher > 0.0
        ids = tl.load(ids_ptr + entries, mask=counts, other=0)
        logits = tl.load(logits_ptr + ids, mask=counts, other=0.0).to(tl.float32)
        log_teacher = tl.log(tl.where(counts, teacher, 1.0))
        kl += tl.sum(teacher * (log_teacher - logits + log_normalizer), 0)
    tl.store(kl_ptr + row, weight * kl)
    tl.store(ce_ptr + row, -weight * log_prediction)

    if WANTS_GRADIENT:
        mass = alpha * tl.load(teacher_mass_ptr + row) + label_mass
        for start in range(0, vocabulary_size, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < vocabulary_size
            logits = tl.load(logits_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)
            d_logits = weight * mass * tl.exp(logits - log_normalizer)
            tl.store(d_logits_ptr + columns, d_logits.to(d_logits_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the places below were written above, perhaps by other threads
        label_is_entry = 0
        for start in range(first, last, ENTRIES):
            entries = start + tl.arange(0, ENTRIES)
            teacher = tl.load(teacher_ptr + entries, mask=entries < last, other=0.0)
            counts = teacher > 0.0  # an id that repeats has all its mass on one entry
            ids = tl.load(ids_ptr + entries, mask=counts, other=-1)
            logits = tl.load(logits_ptr + ids, mask=counts, other=0.0).to(tl.float32)
            is_label = ids == label
            label_is_entry = tl.maximum(label_is_entry, tl.max(is_label.to(tl.int32), 0))
            target = alpha * teacher + tl.where(is_label, label_mass, 0.0)
            d_logits = weight * (mass * tl.exp(logits - log_normalizer) - target)
            tl.store(d_logits_ptr + ids, d_logits.to(d_logits_ptr.dtype.element_ty), mask=counts)
        d_label = weight * (mass * tl.exp(label_logit - log_normalizer) - label_mass)
        tl.store(d_logits_ptr + label, d_label.to(d_logits_ptr.dtype.element_ty), mask=label_is_entry == 0)


def sparse_rows(
    logits_CV: Tensor,
    *,
    offsets_C1: Tensor,
    ids_E: Tensor,
    teacher_E: Tensor,
    teacher_mass_C: Tensor,
    alphas_C: Tensor,
    labels_C: Tensor,
    weights_C: Tensor,
    log_base_C: Tensor | None,
    log_lambda: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """w KL and w CE of the rows, float32 [C], and the gradient of the logits [C, V] if a dtype is given for
    it.

    ``logits_CV`` float32; its rows may have gaps between them, and the gradient's have the same.
    ``offsets_C1`` point into the entries of all rows; an id has mass on one of its entries at most.
    ``log_base_C`` is log((1-λ) p_base(label)), or None for plain CE;
    ``log_lambda`` is log λ.
    """
    num_rows, vocabulary_size = logits_CV.shape
    assert logits_CV.stride(1) == 1
    kl_C, ce_C = torch.empty_like(weights_C), torch.empty_like(weights_C)
    d_logits_CV = None
    if gradient_dtype is not None:
        size, strides = logits_CV.shape, logits_CV.stride()
        d_logits_CV = torch.empty_strided(size, strides, dtype=gradient_dtype, device=logits_CV.device)
    columns = min(_MAX_COLUMNS, triton.next_power_of_2(vocabulary_size))
    with torch.cuda.device_of(logits_CV):
        sparse_rows_kernel[(num_rows,)](
            logits_CV,
            logits_CV if d_logits_CV is None else d_logits_CV,
            offsets_C1,
            ids_E,
            teacher_E,
            teacher_mass_C,
            alphas_C,
            labels_C,
            weights_C,
            weights_C if log_base_C is None else log_base_C,
            kl_C,
            ce_C,
            vocabulary_size,
            logits_CV.stride(0),
            log_lambda,
            THROUGH_MIXTURE=log_base_C is not None,
            WANTS_GRADIENT=d_logits_CV is not None,
            COLUMNS=columns,
            ENTRIES=_ENTRIES,
            num_warps=16 if columns >= 4096 else 4,
            enable_fp_fusion=True,
        )
    return kl_C, ce_C, d_logits_CV
