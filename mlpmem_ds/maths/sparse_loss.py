"""Pipeline: hidden states of the memory, sparse kNN targets → **training loss and its gradients**.

Row n has the teacher's sparse distribution t, the label y and the weight w. With z = hidden · weightᵀ,

    loss_n = w (α KL(t ‖ softmax z) + (1-α) CE),    CE = -log p_mem(y)  or  -log((1-λ) p_base(y) + λ p_mem(y)),
    m = α t + c (1-α) onehot(y),    s = Σ m,    dloss_n/dz = w (s softmax(z) - m),

where c is 1, or the memory's responsibility λ p_mem(y) / mixture. The factor s is needed wherever a row's mass is not 1,
else all its logits drift. A row whose teacher is empty is pure CE (its α is 0).

Neither a dense target nor all the logits ever exist: rows are taken in chunks, and a chunk's gradients are made while
its logits are at hand. Statistics are float32; matrix products take the operands' dtype.

Shape legend: N rows, D width of the hidden state, V vocabulary, E stored teacher entries, C rows of a chunk,
T columns of a tile of the vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .products import cached_rows, fill_logits, product, set_transposed_product, vocabulary_tiles

DEFAULT_CHUNK_BYTES = 128 * 2**20
# On a GPU a chunk costs a pass over the weight's gradient: 2048 rows of a vocabulary of 128 k, float32 and their gradient.
CUDA_CHUNK_BYTES = 1536 * 2**20
_LEAST_MASS = 1e-30


@dataclass(frozen=True, kw_only=True)
class TargetBatch:
    """Targets of N rows; row n has the teacher entries ``[offsets[n], offsets[n + 1])``.

    ``offsets_N1`` int64, ``ids`` int64 [E] (an id may repeat within a row), ``probabilities`` float32 [E] (not negative),
    ``labels_N`` int64, ``row_weights_N`` float32 (0 = ignored, whatever its label; None = all 1),
    ``base_log_probabilities_N`` float32, log p_base(label), needed for CE through the mixture.
    """

    offsets_N1: Tensor
    ids: Tensor
    probabilities: Tensor
    labels_N: Tensor
    row_weights_N: Tensor | None = None
    base_log_probabilities_N: Tensor | None = None

    def to(self, device: torch.device | str) -> "TargetBatch":
        """The same on another device, but for the offsets: they stay on the host, where they bound the chunks without a wait."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return TargetBatch(
            offsets_N1=self.offsets_N1.cpu(),
            ids=self.ids.to(device, non_blocking=True),
            probabilities=self.probabilities.to(device, non_blocking=True),
            labels_N=self.labels_N.to(device, non_blocking=True),
            row_weights_N=move(self.row_weights_N),
            base_log_probabilities_N=move(self.base_log_probabilities_N),
        )


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Detached float32 scalars on the loss's device: Σ w KL over rows that have a teacher, Σ w CE, Σ w."""

    kl: Tensor
    ce: Tensor
    weight: Tensor


def sparse_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets: TargetBatch,
    *,
    alpha: float,
    mixture_lambda: float | None = None,
    renormalise: bool = True,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Sums]:
    """Sum over the rows of the loss above (float32 scalar, differentiable once), and its parts. The caller divides.

    ``alpha`` weighs KL against CE. With ``mixture_lambda`` CE goes through the mixture. ``renormalise`` divides each
    teacher row by its sum; else a truncated row keeps its mass below 1. ``chunk_bytes`` bounds what a chunk's logits take
    (None: as suits the device). On CUDA a Triton kernel does the row work, if Triton is installed.
    """
    _check(hidden_ND, weight_VD, targets, alpha, mixture_lambda)
    with torch.no_grad():
        rows = _prepare(targets, hidden_ND.device, alpha, mixture_lambda, renormalise)
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if hidden_ND.is_cuda else DEFAULT_CHUNK_BYTES
    loss, kl, ce = _FusedSparseLoss.apply(hidden_ND, weight_VD, rows, chunk_bytes)
    return loss, Sums(kl=kl, ce=ce, weight=rows.weights_N.sum())


def row_chunks(num_rows: int, vocabulary_size: int, chunk_bytes: int, *, bytes_per_logit: int = 4) -> Iterator[slice]:
    """Slices over the rows, even in size, whose logits take at most ``chunk_bytes`` (or hold one row)."""
    most = max(1, chunk_bytes // (bytes_per_logit * vocabulary_size))
    num_chunks = -(-num_rows // most)
    for chunk in range(num_chunks):
        yield slice(num_rows * chunk // num_chunks, num_rows * (chunk + 1) // num_chunks)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Targets made ready: ignored rows are harmless, teacher rows scaled, α by row. Offsets are plain integers."""

    offsets: list[int]
    offsets_N1: Tensor  # the same on the device
    row_of_entry_E: Tensor
    ids_E: Tensor
    teacher_E: Tensor
    teacher_mass_N: Tensor
    alphas_N: Tensor
    labels_N: Tensor
    weights_N: Tensor
    log_base_N: Tensor | None  # log((1-λ) p_base(label))
    log_lambda: float


def _prepare(
    targets: TargetBatch, device: torch.device, alpha: float, mixture_lambda: float | None, renormalise: bool
) -> _Rows:
    num_rows, num_entries = len(targets.labels_N), len(targets.ids)
    offsets_N1 = targets.offsets_N1.to(device, non_blocking=True)
    row_of_entry_E = torch.repeat_interleave(offsets_N1.diff(), output_size=num_entries)
    teacher_E = targets.probabilities.float()
    mass_N = torch.zeros(num_rows, device=device).index_add_(0, row_of_entry_E, teacher_E)
    if renormalise:
        teacher_E = teacher_E / mass_N.clamp_min(torch.finfo(torch.float32).tiny)[row_of_entry_E]
    has_teacher_N = mass_N > 0
    weights_N = torch.ones(num_rows, device=device) if targets.row_weights_N is None else targets.row_weights_N.float()
    ids_E, teacher_E = _merge_repeated(row_of_entry_E, targets.ids, teacher_E)
    ignored_N = weights_N == 0
    log_base_N = None
    if mixture_lambda is not None and targets.base_log_probabilities_N is not None:
        log_keep = math.log1p(-mixture_lambda) if mixture_lambda < 1 else -math.inf
        log_base_N = (targets.base_log_probabilities_N.float() + log_keep).masked_fill(ignored_N, 0.0)
    return _Rows(
        offsets=targets.offsets_N1.tolist(),
        offsets_N1=offsets_N1,
        row_of_entry_E=row_of_entry_E,
        ids_E=ids_E,
        teacher_E=teacher_E,
        teacher_mass_N=has_teacher_N.float() if renormalise else mass_N,
        alphas_N=has_teacher_N.float() * alpha,
        labels_N=targets.labels_N.masked_fill(ignored_N, 0),
        weights_N=weights_N,
        log_base_N=log_base_N,
        log_lambda=0.0 if mixture_lambda is None else math.log(mixture_lambda),
    )


def _merge_repeated(row_of_entry_E: Tensor, ids_E: Tensor, teacher_E: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ascending in each row, the mass of a repeated id on the first of its entries and 0 on the others.

    The gradient would be right without it, t log t would not.
    """
    ascends_E = (ids_E[1:] > ids_E[:-1]) | (row_of_entry_E[1:] != row_of_entry_E[:-1])
    if not ids_E.is_cuda and bool(ascends_E.all()):  # as our shards have them; on a GPU asking would wait for it
        return ids_E, teacher_E
    order_E = torch.argsort(ids_E, stable=True)
    order_E = order_E[torch.argsort(row_of_entry_E[order_E], stable=True)]
    ids_E = ids_E[order_E]
    is_first_E = torch.ones_like(ids_E, dtype=torch.bool)
    is_first_E[1:] = (ids_E[1:] != ids_E[:-1]) | (row_of_entry_E[1:] != row_of_entry_E[:-1])
    group_E = is_first_E.cumsum(0) - 1
    sums_E = torch.zeros_like(teacher_E).index_add_(0, group_E, teacher_E[order_E])
    return ids_E, sums_E[group_E] * is_first_E


class _FusedSparseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, rows: _Rows, chunk_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype, device = hidden_ND.dtype, hidden_ND.device
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight_VD = torch.empty(weight_VD.shape, device=device) if wants_weight else None
        sums = torch.zeros(3, device=device)
        bytes_per_logit = 4 + (dtype.itemsize if device.type != "cpu" else 0)
        chunks = list(row_chunks(len(hidden_ND), len(weight_VD), chunk_bytes, bytes_per_logit=bytes_per_logit))
        buffer_CV = torch.empty(max(map(_length, chunks), default=0), len(weight_VD), device=device)
        for chunk in chunks:
            logits_CV = buffer_CV[: _length(chunk)]
            fill_logits(logits_CV, hidden_ND[chunk], weight_VD)
            work = _chunk_by_kernel if kernels.usable(logits_CV) else _chunk_by_torch
            chunk_sums, tiles, scales_C = work(logits_CV, rows, chunk, dtype if wants_hidden or wants_weight else None)
            sums += chunk_sums
            _add_gradients(d_hidden_ND, d_weight_VD, hidden_ND, weight_VD, chunk, tiles, scales_C)
        if d_weight_VD is not None and not chunks:
            d_weight_VD.zero_()
        ctx.gradients = (d_hidden_ND, d_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        loss, kl, ce = sums.unbind()
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("sparse_loss keeps its gradients for one backward; call it again for another")
        d_hidden_ND, d_weight_VD = ctx.gradients
        ctx.gradients = None
        if d_hidden_ND is not None:
            d_hidden_ND.mul_(d_loss)
        if d_weight_VD is not None:
            d_weight_VD = _scaled(d_weight_VD, d_loss, ctx.weight_dtype)
        return d_hidden_ND, d_weight_VD, None, None


def _length(chunk: slice) -> int:
    return int(chunk.stop - chunk.start)


def _scaled(d_weight_VD: Tensor, d_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """d_weight · d_loss in the weight's dtype; ``d_weight_VD`` is overwritten."""
    if dtype == d_weight_VD.dtype:
        return d_weight_VD.mul_(d_loss)
    result_VD = torch.empty_like(d_weight_VD, dtype=dtype)
    for rows in cached_rows(d_weight_VD):
        result_VD[rows] = d_weight_VD[rows].mul_(d_loss)
    return result_VD


def _add_gradients(
    d_hidden_ND: Tensor | None,
    d_weight_VD: Tensor | None,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    chunk: slice,
    tiles: Iterable[tuple[slice, Tensor]],
    scales_C: Tensor | None,
) -> None:
    """Set the chunk's rows of ``d_hidden_ND``, set or add to ``d_weight_VD`` (float32), whichever are wanted.

    The logits' gradient is the tiles, each row times its scale: the scales go to the hidden states and to the result, which
    are D wide and not V.
    """
    hidden_DC = None
    if d_weight_VD is not None:
        hidden_CD = hidden_ND[chunk]
        if scales_C is not None:
            hidden_CD = (hidden_CD * scales_C[:, None]).to(hidden_ND.dtype)
        hidden_DC = hidden_CD.t().contiguous()
    d_hidden_CD = None
    for columns, d_logits_CT in tiles:
        if d_hidden_ND is not None:
            part_CD = product(d_logits_CT, weight_VD[columns])
            d_hidden_CD = part_CD if d_hidden_CD is None else d_hidden_CD.add_(part_CD)
        if d_weight_VD is not None and hidden_DC is not None:
            set_transposed_product(d_weight_VD[columns], hidden_DC, d_logits_CT, accumulate=chunk.start > 0)
    if d_hidden_ND is not None and d_hidden_CD is not None:
        d_hidden_ND[chunk] = d_hidden_CD if scales_C is None else d_hidden_CD.mul_(scales_C[:, None])


def _chunk_by_kernel(
    logits_CV: Tensor, rows: _Rows, chunk: slice, gradient_dtype: torch.dtype | None
) -> tuple[Tensor, list[tuple[slice, Tensor]], None]:
    """Sums [loss, kl, ce] of a chunk, and the logits' gradient if it is wanted: Triton's twin of the function below."""
    from .kernels.sparse_rows import sparse_rows

    alphas_C = rows.alphas_N[chunk]
    kl_C, ce_C, d_logits_CV = sparse_rows(
        logits_CV,
        offsets_C1=rows.offsets_N1[chunk.start : chunk.stop + 1],
        ids_E=rows.ids_E,
        teacher_E=rows.teacher_E,
        teacher_mass_C=rows.teacher_mass_N[chunk],
        alphas_C=alphas_C,
        labels_C=rows.labels_N[chunk],
        weights_C=rows.weights_N[chunk],
        log_base_C=None if rows.log_base_N is None else rows.log_base_N[chunk],
        log_lambda=rows.log_lambda,
        gradient_dtype=gradient_dtype,
    )
    loss = (alphas_C * kl_C + (1 - alphas_C) * ce_C).sum()
    tiles = [] if d_logits_CV is None else [(slice(0, logits_CV.shape[1]), d_logits_CV)]
    return torch.stack([loss, kl_C.sum(), ce_C.sum()]), tiles, None


def _chunk_by_torch(
    logits_CV: Tensor, rows: _Rows, chunk: slice, gradient_dtype: torch.dtype | None
) -> tuple[Tensor, Iterable[tuple[slice, Tensor]], Tensor | None]:
    """Sums [loss, kl, ce] of a chunk, and tiles and row scales of the logits' gradient if wanted; overwrites ``logits_CV``."""
    entries = slice(rows.offsets[chunk.start], rows.offsets[chunk.stop])
    ids_E, teacher_E, row_E = rows.ids_E[entries], rows.teacher_E[entries], rows.row_of_entry_E[entries] - chunk.start
    labels_C, weights_C, alphas_C = rows.labels_N[chunk], rows.weights_N[chunk], rows.alphas_N[chunk]
    places_E = row_E * logits_CV.shape[1] + ids_E
    entry_logits_E = logits_CV.view(-1)[places_E]
    label_logits_C = logits_CV.gather(1, labels_C[:, None])[:, 0]
    log_normaliser_C, exp_sums_C = _exponentiate(logits_CV)

    entry_kl_E = torch.xlogy(teacher_E, teacher_E) - teacher_E * (entry_logits_E - log_normaliser_C[row_E])
    label_log_probability_C = label_logits_C - log_normaliser_C
    if rows.log_base_N is None:
        log_prediction_C, label_mass_C = label_log_probability_C, 1 - alphas_C
    else:
        log_memory_C = label_log_probability_C + rows.log_lambda
        log_prediction_C = torch.logaddexp(rows.log_base_N[chunk], log_memory_C)
        label_mass_C = (1 - alphas_C) * (log_memory_C - log_prediction_C).exp()

    weighted_kl_E = weights_C[row_E] * entry_kl_E
    weighted_ce_C = -weights_C * log_prediction_C
    loss = (alphas_C[row_E] * weighted_kl_E).sum() + ((1 - alphas_C) * weighted_ce_C).sum()
    sums = torch.stack([loss, weighted_kl_E.sum(), weighted_ce_C.sum()])
    if gradient_dtype is None:
        return sums, [], None
    # w (s softmax(z) - m) = (w s / S) (exp(z - max) - (S / s) m), S the sum of the exponentials: so no pass over the logits
    # scales them. s may underflow, and m with it.
    mass_C = alphas_C * rows.teacher_mass_N[chunk] + label_mass_C
    factors_C = torch.where(mass_C > _LEAST_MASS, exp_sums_C / mass_C, 0.0)
    logits_CV.view(-1).index_add_(0, places_E, -(alphas_C * factors_C)[row_E] * teacher_E)
    logits_CV.scatter_add_(1, labels_C[:, None], -(label_mass_C * factors_C)[:, None])
    return sums, _gradient_tiles(logits_CV, gradient_dtype), weights_C * mass_C / exp_sums_C


def _gradient_tiles(logits_CV: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """A contiguous tile [C, T] of the vocabulary at a time, rounded to the operands' dtype."""
    for columns in vocabulary_tiles(logits_CV.shape[1], logits_CV.device):
        tile_CT = logits_CV[:, columns]
        yield columns, tile_CT.contiguous() if dtype == tile_CT.dtype else tile_CT.to(dtype).contiguous()


def _exponentiate(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Replace z by exp(z - max z), row by row; return log Σ exp z and Σ exp(z - max z), [C] each.

    Four passes, for torch.softmax, though faster (it fuses them), is exact to 1e-5 only; over few rows at a time, which
    stay in the cache.
    """
    log_normaliser_C, sums_C = logits_CV.new_empty(2, len(logits_CV)).unbind()
    for rows in cached_rows(logits_CV):
        greatest_R1 = logits_CV[rows].amax(1, keepdim=True)
        sums_C[rows] = logits_CV[rows].sub_(greatest_R1).exp_().sum(1)
        log_normaliser_C[rows] = greatest_R1[:, 0] + sums_C[rows].log()
    return log_normaliser_C, sums_C


def _check(
    hidden_ND: Tensor, weight_VD: Tensor, targets: TargetBatch, alpha: float, mixture_lambda: float | None
) -> None:
    if hidden_ND.dtype != weight_VD.dtype or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden states are {hidden_ND.dtype} of width {hidden_ND.shape[1]}, head weights {weight_VD.dtype} of width "
            f"{weight_VD.shape[1]}; they must agree"
        )
    if len(targets.labels_N) != len(hidden_ND) or len(targets.offsets_N1) != len(hidden_ND) + 1:
        raise ValueError(
            f"{len(hidden_ND)} hidden states, {len(targets.labels_N)} labels, {len(targets.offsets_N1)} offsets; "
            "N, N and N + 1 are wanted"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; the weight of KL against CE lies in [0, 1]")
    if mixture_lambda is not None and not 0 < mixture_lambda <= 1:
        raise ValueError(f"mixture_lambda is {mixture_lambda}; it lies in (0, 1], or is None for plain CE")
    if mixture_lambda is not None and targets.base_log_probabilities_N is None:
        raise ValueError(f"mixture_lambda is {mixture_lambda} but the targets have no base_log_probabilities_N")
