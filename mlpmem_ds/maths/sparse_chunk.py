"""Pipeline: hidden states of a chunk of rows, prepared targets → **its part of the training loss, and of the
gradients**.

The logits come a tile of the vocabulary at a time, from one product each. What is kept of them is what the
gradient is made of, exp(z - shift) in the operands' dtype, with the tiles one after another in memory, so
that each is a matrix without gaps. With S its sum over a row, the gradient of the logits (see `sparse_loss`)
is

    w (s softmax(z) - m) = (w s / S) (exp(z - shift) - S m / s),

so the factor w s / S of a row goes to what is D wide, and nothing that is V wide is read a second time but by
the products.

The shift is a row's greatest logit in the first tile: any number that keeps the exponentials finite is right.
Where it does not (a logit elsewhere is larger by 46), the chunk is done again with the greatest of all.
Exponentials are powers of two.

Shape legend: C rows of the chunk, D width of the hidden state, V vocabulary, T columns of a tile, E stored
teacher entries, A the entries and after them the C labels.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import logits_of_tile, product, set_transposed_product, vocabulary_tiles
from .sparse_targets import PreparedTargets

_MIN_MASS = 1e-30
MAX_SUM = 1e20  # of exponentials: far below what float32 and bfloat16 hold, far above a vocabulary
# exp2 takes a quarter of the time of exp on CPU (PyTorch 2.13: exp goes through MKL).
LN_2, LOG2_E = math.log(2), math.log2(math.e)

Tiles = Iterable[tuple[slice, Tensor]]
"""Columns of the vocabulary, and the logits' gradient there [C, T], but for a factor of each row."""


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """Sums [loss, kl, ce] of a chunk; the logits' gradient, as tiles and a factor of each row (None: 1)."""

    sums_3: Tensor
    tiles: Tiles
    scales_C: Tensor | None


def chunk_by_kernel(
    logits_CV: Tensor, targets: PreparedTargets, chunk: slice, gradient_dtype: torch.dtype | None
) -> ChunkResult:
    """By Triton: `logits_CV` float32, the gradient in `gradient_dtype` (None: not needed)."""
    from .kernels.sparse_rows import sparse_rows

    alphas_C = targets.alphas_N[chunk]
    kl_C, ce_C, d_logits_CV = sparse_rows(
        logits_CV,
        offsets_C1=targets.offsets_N1[chunk.start : chunk.stop + 1],
        ids_E=targets.ids_E,
        teacher_E=targets.teacher_E,
        teacher_mass_C=targets.teacher_mass_N[chunk],
        alphas_C=alphas_C,
        labels_C=targets.labels_N[chunk],
        weights_C=targets.weights_N[chunk],
        log_base_C=None if targets.log_base_N is None else targets.log_base_N[chunk],
        log_lambda=targets.log_lambda,
        gradient_dtype=gradient_dtype,
    )
    loss = (alphas_C * kl_C + (1 - alphas_C) * ce_C).sum()
    tiles = [] if d_logits_CV is None else [(slice(0, logits_CV.shape[1]), d_logits_CV)]
    return ChunkResult(sums_3=torch.stack([loss, kl_C.sum(), ce_C.sum()]), tiles=tiles, scales_C=None)


def chunk_of_logits(
    logits_CV: Tensor, targets: PreparedTargets, chunk: slice, gradient_dtype: torch.dtype | None
) -> ChunkResult:
    """What `chunk_by_kernel` gives, by PyTorch: for logits that something was done to (a soft cap), of which
    `chunk_by_torch` would know nothing."""
    entries = slice(targets.offsets[chunk.start], targets.offsets[chunk.stop])
    ids_E, teacher_E = targets.ids_E[entries], targets.teacher_E[entries]
    row_E = targets.row_of_entry_E[entries] - chunk.start
    labels_C, alphas_C = targets.labels_N[chunk], targets.alphas_N[chunk]
    weights_C, row_C = targets.weights_N[chunk], torch.arange(len(logits_CV), device=logits_CV.device)
    log_sums_C = logits_CV.logsumexp(1)
    logs_E = logits_CV[row_E, ids_E] - log_sums_C[row_E]
    log_prediction_C, label_mass_C = logits_CV[row_C, labels_C] - log_sums_C, 1 - alphas_C
    if targets.log_base_N is not None:
        log_memory_C = log_prediction_C + targets.log_lambda
        log_prediction_C = torch.logaddexp(targets.log_base_N[chunk], log_memory_C)
        label_mass_C = label_mass_C * (log_memory_C - log_prediction_C).exp()
    kl_E = torch.xlogy(teacher_E, teacher_E) - teacher_E * logs_E
    kl_C = weights_C * torch.zeros_like(weights_C).index_add_(0, row_E, kl_E)
    ce_C = -weights_C * log_prediction_C
    loss = (alphas_C * kl_C + (1 - alphas_C) * ce_C).sum()
    tiles: list[tuple[slice, Tensor]] = []
    if gradient_dtype is not None:
        mass_C = alphas_C * targets.teacher_mass_N[chunk] + label_mass_C
        d_logits_CV = (logits_CV - log_sums_C[:, None]).exp_().mul_((weights_C * mass_C)[:, None])
        d_logits_CV.index_put_((row_E, ids_E), -(weights_C * alphas_C)[row_E] * teacher_E, accumulate=True)
        d_logits_CV.index_put_((row_C, labels_C), -weights_C * label_mass_C, accumulate=True)
        tiles = [(slice(0, logits_CV.shape[1]), d_logits_CV.to(gradient_dtype))]
    return ChunkResult(sums_3=torch.stack([loss, kl_C.sum(), ce_C.sum()]), tiles=tiles, scales_C=None)


def through_softcap(result: ChunkResult, logits_CV: Tensor, softcap: float) -> None:
    """Turn the gradient of capped logits, z = softcap tanh(x / softcap), into that of x; `logits_CV`, which
    are z, are overwritten."""
    logits_CV.div_(softcap).square_().neg_().add_(1)  # dz / dx
    for columns, d_logits_CT in result.tiles:
        d_logits_CT.mul_(logits_CV[:, columns])


def chunk_by_torch(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    targets: PreparedTargets,
    chunk: slice,
    store: Tensor | None,
    divisor: float,
) -> ChunkResult:
    """The same by PyTorch. `store` holds at least C · V numbers, and the gradient after this; None: it is not
    needed.

    The rows' factors are divided by `divisor`, the sums are not.
    """
    named = named_places(targets, chunk, weight_VD)
    found = _exponentiate(hidden_CD, weight_VD, named, None, store)
    if not bool((found.sums_C <= MAX_SUM).all()):
        found = _exponentiate(hidden_CD, weight_VD, named, greatest_logits(hidden_CD, weight_VD), store)
    num_entries = len(named.teacher_E)
    row_E = named.row_A[:num_entries]
    weights_C, alphas_C = targets.weights_N[chunk], targets.alphas_N[chunk]

    logs_A = (found.exponents_A - found.sums_C.log2()[named.row_A]) * LN_2
    entry_kl_E = torch.xlogy(named.teacher_E, named.teacher_E) - named.teacher_E * logs_A[:num_entries]
    if targets.log_base_N is None:
        log_prediction_C, label_mass_C = logs_A[num_entries:], 1 - alphas_C
    else:
        log_memory_C = logs_A[num_entries:] + targets.log_lambda
        log_prediction_C = torch.logaddexp(targets.log_base_N[chunk], log_memory_C)
        label_mass_C = (1 - alphas_C) * (log_memory_C - log_prediction_C).exp()
    weighted_kl_E = weights_C[row_E] * entry_kl_E
    weighted_ce_C = -weights_C * log_prediction_C
    loss = (alphas_C[row_E] * weighted_kl_E).sum() + ((1 - alphas_C) * weighted_ce_C).sum()
    sums_3 = torch.stack([loss, weighted_kl_E.sum(), weighted_ce_C.sum()])
    if store is None:
        return ChunkResult(sums_3=sums_3, tiles=[], scales_C=None)

    mass_C = alphas_C * targets.teacher_mass_N[chunk] + label_mass_C
    inverse_C = torch.where(mass_C > _MIN_MASS, 1 / mass_C, 0.0)  # s may underflow, and m with it
    shares_A = torch.cat([(alphas_C * inverse_C)[row_E] * named.teacher_E, label_mass_C * inverse_C])
    shares_A = _with_labels_joined(shares_A, named)
    values_A = found.exponents_A.exp2() - found.sums_C[named.row_A] * shares_A
    store.index_copy_(0, named.place_A, values_A.to(store.dtype))
    tiles = stored_tiles(store, len(hidden_CD), weight_VD)
    return ChunkResult(sums_3=sums_3, tiles=tiles, scales_C=weights_C * mass_C / (divisor * found.sums_C))


def add_gradients(
    d_hidden_ND: Tensor | None,
    d_weight_VD: Tensor | None,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    chunk: slice,
    result: ChunkResult,
) -> None:
    """Set the chunk's rows of ``d_hidden_ND``, set or (after the first chunk) add to ``d_weight_VD``,
    whichever are needed."""
    hidden_CD, scales_C = hidden_ND[chunk], result.scales_C
    if scales_C is not None and d_weight_VD is not None:
        hidden_CD = (hidden_CD * scales_C[:, None]).to(hidden_ND.dtype)
    # Which of the two has no gaps decides the speed of the product with the tile: oneDNN's float32, or
    # PyTorch's of 16 bits.
    hidden_DC = hidden_CD.t().contiguous() if hidden_CD.dtype == torch.float32 else hidden_CD.t()
    d_hidden_CD = None
    for columns, d_logits_CT in result.tiles:
        if d_hidden_ND is not None:
            part_CD = product(d_logits_CT, weight_VD[columns])
            d_hidden_CD = part_CD if d_hidden_CD is None else d_hidden_CD.add_(part_CD)
        if d_weight_VD is not None:
            set_transposed_product(d_weight_VD[columns], hidden_DC, d_logits_CT, accumulate=chunk.start > 0)
    if d_hidden_ND is not None and d_hidden_CD is not None:
        d_hidden_ND[chunk] = d_hidden_CD if scales_C is None else d_hidden_CD.mul_(scales_C[:, None])


@dataclass(frozen=True, kw_only=True)
class Named:
    """The chunk's entries that have mass, and after them its labels.

    int64 [A] each: rows of the chunk, ids of the vocabulary, and places in a store of the logits of all
    tiles, tile after tile.
    """

    row_A: Tensor
    id_A: Tensor
    place_A: Tensor  # in a store of all tiles
    by_tile_A: Tensor  # the order in which the tiles meet them
    num_by_tile: list[int]
    teacher_E: Tensor
    vocabulary_size: int


def named_places(targets: PreparedTargets, chunk: slice, weight_VD: Tensor) -> Named:
    """Where the logits that a chunk's loss names lie among those of all tiles."""
    entries = slice(targets.offsets[chunk.start], targets.offsets[chunk.stop])
    num_rows = chunk.stop - chunk.start
    ids_E, teacher_E = targets.ids_E[entries], targets.teacher_E[entries]
    row_E = targets.row_of_entry_E[entries] - chunk.start
    has_mass_E = teacher_E > 0
    if not bool(has_mass_E.all()):
        ids_E, teacher_E, row_E = ids_E[has_mass_E], teacher_E[has_mass_E], row_E[has_mass_E]
    id_A = torch.cat([ids_E, targets.labels_N[chunk]])
    row_A = torch.cat([row_E, torch.arange(num_rows, device=row_E.device)])
    tiles = list(vocabulary_tiles(len(weight_VD), weight_VD.device))
    tile_columns = tiles[0].stop
    tile_A = id_A // tile_columns
    start_A = tile_A * tile_columns
    columns_A = (len(weight_VD) - start_A).clamp(max=tile_columns)
    return Named(
        row_A=row_A,
        id_A=id_A,
        place_A=start_A * num_rows + row_A * columns_A + (id_A - start_A),
        # int16 holds 32,000 tiles: a vocabulary of 33 million.
        by_tile_A=torch.argsort(tile_A.to(torch.int16), stable=True),
        num_by_tile=torch.bincount(tile_A, minlength=len(tiles)).tolist(),
        teacher_E=teacher_E,
        vocabulary_size=len(weight_VD),
    )


def _with_labels_joined(shares_A: Tensor, named: Named) -> Tensor:
    """A label that is also an entry of its row: both get the sum of their shares, for both write the same
    place."""
    num_entries = len(named.teacher_E)
    if num_entries == 0:
        return shares_A
    key_A = named.row_A * named.vocabulary_size + named.id_A
    key_E, key_C = key_A[:num_entries], key_A[num_entries:].contiguous()
    entry_C = torch.searchsorted(key_E, key_C).clamp_(max=num_entries - 1)
    share_E, share_C = shares_A[:num_entries], shares_A[num_entries:]
    is_entry_C = key_E[entry_C] == key_C
    share_E.index_add_(0, entry_C, share_C * is_entry_C)
    return torch.cat([share_E, torch.where(is_entry_C, share_E[entry_C], share_C)])


@dataclass(frozen=True, kw_only=True)
class _Exponentials:
    """`sums_C` of 2^x with x = z log2(e) - shift, and x where the targets name it, float32."""

    sums_C: Tensor
    exponents_A: Tensor


def _exponentiate(
    hidden_CD: Tensor, weight_VD: Tensor, named: Named, shift_C: Tensor | None, store: Tensor | None
) -> _Exponentials:
    """One pass over the vocabulary; 2^x is left in the store, tile after tile. The shift is of z; None: of
    the first tile."""
    num_rows, device = len(hidden_CD), hidden_CD.device
    sums_C = torch.zeros(num_rows, device=device)
    place_A, done, parts = named.place_A[named.by_tile_A], 0, []
    scratch = None
    for columns, num_named in zip(vocabulary_tiles(len(weight_VD), device), named.num_by_tile, strict=True):
        logits_CT = logits_of_tile(hidden_CD, weight_VD[columns])
        parts.append(logits_CT.view(-1)[place_A[done : done + num_named] - columns.start * num_rows])
        done += num_named
        if shift_C is None:
            shift_C = logits_CT.amax(1).float()
        shift_C1 = (shift_C * -LOG2_E)[:, None]
        if logits_CT.dtype != torch.float32:  # widened where the last tile was: that is still in the cache
            scratch = torch.empty(logits_CT.numel(), device=device) if scratch is None else scratch
            logits_CT = scratch[: logits_CT.numel()].view(logits_CT.shape).copy_(logits_CT)
        stored_CT = None if store is None else tile_of(store, num_rows, columns)
        powers_CT = stored_CT if stored_CT is not None and stored_CT.dtype == torch.float32 else logits_CT
        torch.add(shift_C1, logits_CT, alpha=LOG2_E, out=powers_CT)
        sums_C += powers_CT.exp2_().sum(1)
        if stored_CT is not None and stored_CT is not powers_CT:
            stored_CT.copy_(powers_CT)
    logits_A = torch.empty(len(place_A), device=device)
    logits_A[named.by_tile_A] = torch.cat(parts).float()
    return _Exponentials(
        sums_C=sums_C, exponents_A=torch.add(shift_C1[named.row_A, 0], logits_A, alpha=LOG2_E)
    )


def greatest_logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    parts = [
        logits_of_tile(hidden_CD, weight_VD[columns]).amax(1)
        for columns in vocabulary_tiles(len(weight_VD), hidden_CD.device)
    ]
    return torch.stack(parts).amax(0).float()


def tile_of(store: Tensor, num_rows: int, columns: slice) -> Tensor:
    return store[columns.start * num_rows : columns.stop * num_rows].view(num_rows, -1)


def stored_tiles(store: Tensor, num_rows: int, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for columns in vocabulary_tiles(len(weight_VD), weight_VD.device):
        yield columns, tile_of(store, num_rows, columns)
