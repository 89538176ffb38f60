"""Pipeline: hidden states of the memory, sparse kNN targets → **training loss and its gradients**.

Row n has the teacher's sparse distribution t, the label y and the weight w. With z = hidden · weightᵀ,

    loss_n = w (α KL(t ‖ softmax z) + (1-α) CE),   CE = -log p_mem(y)  or  -log((1-λ) p_base(y) + λ p_mem(y)),
    m = α t + c (1-α) onehot(y),    s = Σ m,    dloss_n/dz = w (s softmax(z) - m),

(with a `BasePart` the teacher is joined with the base: `based_chunk`),
where c is 1, or the memory's responsibility λ p_mem(y) / mixture: this is the derivative of
`models.mixture.log_mixture`, to which a test ties it in float64. The factor s is needed wherever a row's
mass is not 1, else all its logits drift. A row whose teacher is empty is pure CE (its α is 0); so is, with
`only_helpful`, a row whose teacher gives the label no more probability than the base does.

A memory that started as its base may have its head's bias, scale and soft cap: z is then softcap ·
tanh(scale · (hidden · weightᵀ + bias) / softcap), and the gradient above passes through that.

Neither a dense target nor all the logits ever exist: rows are taken in chunks, and a chunk's gradients are
made while what they are made of is in memory (`sparse_chunk`). Statistics are float32; matrix products take
the operands' dtype.

Shape legend: N rows, D width of the hidden state, V vocabulary, C rows of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from . import kernels
from .based_chunk import BasePart, bytes_per_logit, chunk_with_base
from .products import cached_rows, fill_logits, padded_columns, padded_rows
from .sparse_chunk import (
    ChunkResult,
    add_gradients,
    chunk_by_kernel,
    chunk_by_torch,
    chunk_of_logits,
    through_softcap,
)
from .sparse_targets import PreparedTargets, TargetBatch, prepare_targets

__all__ = ["CUDA_CHUNK_BYTES", "DEFAULT_CHUNK_BYTES", "Sums", "TargetBatch", "row_chunks", "sparse_loss"]

DEFAULT_CHUNK_BYTES = 128 * 2**20
# On a GPU a chunk costs a pass over the weight's gradient: 2048 rows of a vocabulary of 128 k, float32 and
# their gradient.
CUDA_CHUNK_BYTES = 1536 * 2**20

_ROW_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Detached float32 scalars on the loss's device: Σ w KL over rows that have a teacher, Σ w CE, Σ w, and
    Σ w of the rows where KL is in the loss."""

    kl: Tensor
    ce: Tensor
    weight: Tensor
    taught: Tensor


def sparse_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets: TargetBatch,
    *,
    alpha: float,
    mixture_lambda: float | None = None,
    renormalize: bool = True,
    only_helpful: bool = False,
    base: BasePart | None = None,
    divisor: float = 1.0,
    chunk_bytes: int | None = None,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Sums]:
    """Sum over the rows of the loss above / ``divisor`` (float32 scalar, differentiable once), and its parts,
    undivided.

    ``alpha`` weighs KL against CE. With ``mixture_lambda`` CE goes through the mixture. ``renormalize``
    divides each teacher row by its sum; else a truncated row keeps its mass below 1. ``only_helpful`` leaves
    KL out where the teacher is no better than the base at the label. ``base`` is what the base's whole
    distribution has to do with it. ``chunk_bytes`` bounds what a chunk's logits take (None: as suits the
    device). ``bias_V``, ``scale`` and ``softcap`` are of the logits of the memory. On CUDA a Triton kernel
    does the row work, if Triton is installed and no base is given.
    """
    _check(hidden_ND, weight_VD, targets, alpha, mixture_lambda, only_helpful)
    with torch.no_grad():
        prepared = prepare_targets(
            targets,
            hidden_ND.device,
            alpha=alpha,
            mixture_lambda=mixture_lambda,
            renormalize=renormalize,
            only_helpful=only_helpful,
        )
        weights_N = prepared.weights_N
        taught = (weights_N * (prepared.alphas_N > 0)).sum()
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if hidden_ND.is_cuda else DEFAULT_CHUNK_BYTES
    if bias_V is not None:
        hidden_ND, weight_VD = _with_bias_column(hidden_ND, weight_VD, bias_V)
    if scale != 1.0:
        hidden_ND = hidden_ND * scale
    loss, kl, ce = _FusedSparseLoss.apply(hidden_ND, weight_VD, prepared, base, divisor, chunk_bytes, softcap)
    return loss, Sums(kl=kl, ce=ce, weight=weights_N.sum(), taught=taught)


def row_chunks(
    num_rows: int, vocabulary_size: int, chunk_bytes: int, *, bytes_per_logit: int = 4
) -> Iterator[slice]:
    """Slices over the rows, even in size, whose logits take at most ``chunk_bytes`` (or hold one row)."""
    most = max(1, chunk_bytes // (bytes_per_logit * vocabulary_size))
    num_chunks = -(-num_rows // most)
    for chunk in range(num_chunks):
        yield slice(num_rows * chunk // num_chunks, num_rows * (chunk + 1) // num_chunks)


def _with_bias_column(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
    """The same logits without a bias: it is a column of the weight, for which the hidden states have a 1.

    A copy of the weight a step, for the few families whose heads have a bias. Columns of zeros follow, since
    tensor cores take rows of whole `_ROW_MULTIPLE` numbers.
    """
    ones_N1 = hidden_ND.new_ones(len(hidden_ND), 1)
    missing = -(hidden_ND.shape[1] + 1) % _ROW_MULTIPLE
    hidden_NE = torch.cat([hidden_ND, pad(ones_N1, (0, missing))], dim=1)
    return hidden_NE, torch.cat([weight_VD, pad(bias_V[:, None], (0, missing))], dim=1)


class _FusedSparseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets: PreparedTargets,
        base: BasePart | None,
        divisor: float,
        chunk_bytes: int,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wants_gradient = wants_hidden or wants_weight
        dtype, device = hidden_ND.dtype, hidden_ND.device
        by_kernel = base is None and kernels.usable(hidden_ND)
        from_logits = by_kernel or (base is None and softcap is not None)
        gradient_dtype = dtype if wants_gradient else None
        # What a chunk holds for each logit: float32 logits and their gradient, or the latter only.
        logit_bytes = (4 if from_logits else 0) + (dtype.itemsize if wants_gradient else 0)
        if base is not None:
            logit_bytes = bytes_per_logit(device, gradient_dtype, softcap)
        row_size = padded_columns(len(weight_VD)) if from_logits else len(weight_VD)
        chunks = list(row_chunks(len(hidden_ND), row_size, chunk_bytes, bytes_per_logit=max(1, logit_bytes)))
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight_VD = None
        if wants_weight:  # several chunks are summed in float32
            d_weight_VD = torch.empty_like(weight_VD, dtype=dtype if len(chunks) == 1 else torch.float32)
        numbers = max(map(_length, chunks), default=0) * row_size
        store = None
        if base is None and (from_logits or wants_gradient):
            store = torch.empty(numbers, dtype=torch.float32 if from_logits else dtype, device=device)
        sums_3 = torch.zeros(3, device=device)
        for chunk in chunks:
            hidden_CD = hidden_ND[chunk]
            if base is not None:
                result = chunk_with_base(hidden_CD, weight_VD, targets, chunk, base, gradient_dtype, softcap)
            elif from_logits:
                assert store is not None
                logits_CV = padded_rows(store, _length(chunk), len(weight_VD))
                fill_logits(logits_CV, hidden_CD, weight_VD)
                result = _work_on_logits(logits_CV, targets, chunk, gradient_dtype, softcap, by_kernel)
            else:
                result = chunk_by_torch(hidden_CD, weight_VD, targets, chunk, store, divisor)
            sums_3 += result.sums_3
            add_gradients(d_hidden_ND, d_weight_VD, hidden_ND, weight_VD, chunk, result)
        if d_weight_VD is not None and not chunks:
            d_weight_VD.zero_()
        ctx.gradients = (d_hidden_ND, d_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        # `chunk_by_torch` divides the rows' factors.
        ctx.left_to_divide = divisor if from_logits or base is not None else 1.0
        loss, kl, ce = sums_3.unbind()
        ctx.mark_non_differentiable(kl, ce)
        return loss / divisor, kl, ce

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("sparse_loss keeps its gradients for one backward; call it again for another")
        d_hidden_ND, d_weight_VD = ctx.gradients
        ctx.gradients = None
        d_loss = d_loss / ctx.left_to_divide
        if d_hidden_ND is not None:
            d_hidden_ND.mul_(d_loss)
        if d_weight_VD is not None:
            d_weight_VD = _scaled(d_weight_VD, d_loss, ctx.weight_dtype)
        return d_hidden_ND, d_weight_VD, None, None, None, None, None


def _work_on_logits(
    logits_CV: Tensor,
    targets: PreparedTargets,
    chunk: slice,
    gradient_dtype: torch.dtype | None,
    softcap: float | None,
    by_kernel: bool,
) -> ChunkResult:
    """A chunk's part, out of its float32 logits, before the soft cap; these are overwritten."""
    row_work = chunk_by_kernel if by_kernel else chunk_of_logits
    if softcap is None:
        return row_work(logits_CV, targets, chunk, gradient_dtype)
    logits_CV.div_(softcap).tanh_().mul_(softcap)
    result = row_work(logits_CV, targets, chunk, gradient_dtype)
    through_softcap(result, logits_CV, softcap)
    return result


def _length(chunk: slice) -> int:
    return int(chunk.stop - chunk.start)


def _scaled(d_weight_VD: Tensor, d_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """d_weight · d_loss in the weight's dtype; ``d_weight_VD`` is overwritten."""
    if dtype == d_weight_VD.dtype:
        # As in a step of one micro-batch: a pass over the weight less.
        is_one = not d_loss.is_cuda and bool(d_loss == 1)
        return d_weight_VD if is_one else d_weight_VD.mul_(d_loss)
    result_VD = torch.empty_like(d_weight_VD, dtype=dtype)
    for rows in cached_rows(d_weight_VD):
        result_VD[rows] = d_weight_VD[rows].mul_(d_loss)
    return result_VD


def _check(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets: TargetBatch,
    alpha: float,
    mixture_lambda: float | None,
    only_helpful: bool,
) -> None:
    if hidden_ND.dtype != weight_VD.dtype or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden states are {hidden_ND.dtype} of width {hidden_ND.shape[1]}, head weights"
            f" {weight_VD.dtype} of width {weight_VD.shape[1]}; they must agree"
        )
    if len(targets.labels_N) != len(hidden_ND) or len(targets.offsets_N1) != len(hidden_ND) + 1:
        raise ValueError(
            f"{len(hidden_ND)} hidden states, {len(targets.labels_N)} labels, {len(targets.offsets_N1)}"
            " offsets; N, N and N + 1 are needed"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; the weight of KL against CE lies in [0, 1]")
    if mixture_lambda is not None and not 0 < mixture_lambda <= 1:
        raise ValueError(f"mixture_lambda is {mixture_lambda}; it lies in (0, 1], or is None for plain CE")
    if targets.base_log_probabilities_N is None and (mixture_lambda is not None or only_helpful):
        raise ValueError(
            f"mixture_lambda is {mixture_lambda} and only_helpful {only_helpful} but the targets have no"
            " base_log_probabilities_N"
        )
