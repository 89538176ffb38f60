"""Pipeline: hidden states of a chunk of rows, the base's logits, prepared targets → **its part of a training
loss that needs the base's whole distribution, and of its gradients**.

Two things may be asked of the base, alone or together (see `sparse_loss` for the rest of the loss):

- its distribution joins the teacher: KL is that of q = (1-λ) p_base + λ t;
- its logits are added to the memory's: z = z_base + hidden · weightᵀ (a residual readout).

With q the gradient of the logits is

    w (s softmax(z) - α (1-λ) p_base - α λ t - c (1-α) onehot(y)),   s = α (1-λ + λ Σ t) + c (1-α),

so p_base takes part at every entry, a tile of the vocabulary at a time. What a chunk holds of its rows is
exp(z - max z) and exp(z_base - max z_base), float32. Exponentials are powers of two.

Shape legend: N rows, C rows of the chunk, B width of the base's final state, D width of the memory's, V
vocabulary, T columns of a tile, E stored teacher entries, A the entries and after them the C labels.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import logits_of_tile, vocabulary_tiles
from .sparse_chunk import ChunkResult
from .sparse_targets import PreparedTargets

_LOG2_E = math.log2(math.e)  # exp2 takes a quarter of the time of exp on CPU
_MIN_LOGIT = -1e4  # 2 to its power is 0, and 0 times it is 0, which 0 times -inf is not
_MIN_SCALE = 1e-30


@dataclass(frozen=True, kw_only=True)
class BaseLogits:
    """The base's logits of N rows: transform(hidden · weightᵀ + bias), never all of them at once.

    `transform` is elementwise (a scale, a soft cap); None: nothing.
    """

    hidden_NB: Tensor
    weight_VB: Tensor
    bias_V: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """float32 [C, T]."""
        logits_CT = logits_of_tile(self.hidden_NB[rows], self.weight_VB[columns]).float()
        if self.bias_V is not None:
            logits_CT = logits_CT + self.bias_V[columns].float()
        return logits_CT if self.transform is None else self.transform(logits_CT)


@dataclass(frozen=True, kw_only=True)
class BasePart:
    """What the base has to do with a loss.

    `joined_lambda`: the teacher's share λ of what the memory is pulled towards (None: it is the teacher
    alone). `is_residual`: whether the memory's logits are added to the base's.
    """

    logits: BaseLogits
    joined_lambda: float | None = None
    is_residual: bool = False


def bytes_per_logit(
    base: BasePart, device: torch.device, gradient_dtype: torch.dtype | None, softcap: float | None = None
) -> int:
    """What a chunk holds for each of its logits: on a GPU, whose tile is the whole vocabulary, the tile's
    float32 gradient and that in the operands' dtype too."""
    stored = (4 if base.joined_lambda is None else 8) + (4 if softcap is not None else 0)
    if device.type == "cpu" or gradient_dtype is None:
        return stored
    return stored + 4 + gradient_dtype.itemsize


def chunk_with_base(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    targets: PreparedTargets,
    chunk: slice,
    base: BasePart,
    gradient_dtype: torch.dtype | None,
    softcap: float | None = None,
) -> ChunkResult:
    """Sums, and the logits' gradient in `gradient_dtype` (None: not needed); by PyTorch on any device.

    With a `softcap` the memory's logits are softcap · tanh(hidden · weightᵀ / softcap).
    """
    entries = slice(targets.offsets[chunk.start], targets.offsets[chunk.stop])
    ids_E, teacher_E = targets.ids_E[entries], targets.teacher_E[entries]
    row_E = targets.row_of_entry_E[entries] - chunk.start
    row_C = torch.arange(len(hidden_CD), device=hidden_CD.device)
    place_A = torch.cat([row_E, row_C]) * len(weight_VD) + torch.cat([ids_E, targets.labels_N[chunk]])
    stored = _fill(hidden_CD, weight_VD, chunk, base, softcap)
    logits_A = stored.memory_CV.view(-1)[place_A]
    base_logits_E = None if stored.base_CV is None else stored.base_CV.view(-1)[place_A[: len(ids_E)]]
    found = _exponentiate(stored)
    logs_A = logits_A - found.log_sums_C[torch.cat([row_E, row_C])]
    logs_E, log_prediction_C = logs_A[: len(ids_E)], logs_A[len(ids_E) :]

    lmbda = 1.0 if base.joined_lambda is None else base.joined_lambda
    pulled_E, at_rest_E = lmbda * teacher_E, torch.zeros_like(teacher_E)
    kl_C = torch.zeros_like(found.log_sums_C)
    if base_logits_E is not None:
        at_rest_E = (1 - lmbda) * (base_logits_E - found.base_log_sums_C[row_E]).exp()
        kl_C += (1 - lmbda) * found.divergence_C + _entropy_term(1 - lmbda)
    whole_E = at_rest_E + pulled_E  # q where the teacher names it, of which at_rest is the base's part
    kl_E = torch.xlogy(whole_E, whole_E) - torch.xlogy(at_rest_E, at_rest_E) - pulled_E * logs_E
    kl_C.index_add_(0, row_E, kl_E)

    weights_C, alphas_C = targets.weights_N[chunk], targets.alphas_N[chunk]
    teacher_mass_C, label_mass_C = targets.teacher_mass_N[chunk], 1 - alphas_C
    if targets.log_base_N is not None:
        log_memory_C = log_prediction_C + targets.log_lambda
        log_prediction_C = torch.logaddexp(targets.log_base_N[chunk], log_memory_C)
        label_mass_C = label_mass_C * (log_memory_C - log_prediction_C).exp()
    kl_C, ce_C = weights_C * kl_C * (teacher_mass_C > 0), -weights_C * log_prediction_C
    loss = (alphas_C * kl_C + (1 - alphas_C) * ce_C).sum()
    result = ChunkResult(sums_3=torch.stack([loss, kl_C.sum(), ce_C.sum()]), tiles=[], scales_C=None)
    if gradient_dtype is None:
        return result
    mass_C = alphas_C * (1 - lmbda + lmbda * teacher_mass_C) + label_mass_C
    shares_A = torch.cat([alphas_C[row_E] * pulled_E, label_mass_C])
    scales_C = mass_C / found.sums_C
    # The sparse part goes to where the powers stand, in their scale; it is 0 where no mass is.
    inverse_C = torch.where(scales_C > _MIN_SCALE, -1 / scales_C, 0.0)
    stored.memory_CV.view(-1).index_add_(0, place_A, shares_A * inverse_C[torch.cat([row_E, row_C])])
    base_scales_C = alphas_C * (1 - lmbda) / found.base_sums_C
    tiles = _gradient_tiles(stored, weights_C * scales_C, weights_C * base_scales_C, gradient_dtype)
    return ChunkResult(sums_3=result.sums_3, tiles=tiles, scales_C=None)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Logits, and later their powers; and the derivative of the soft cap at each; float32."""

    memory_CV: Tensor
    base_CV: Tensor | None
    slopes_CV: Tensor | None


def _fill(
    hidden_CD: Tensor, weight_VD: Tensor, chunk: slice, base: BasePart, softcap: float | None
) -> _Stored:
    size, device = (len(hidden_CD), len(weight_VD)), hidden_CD.device
    memory_CV = torch.empty(size, device=device)
    base_CV = None if base.joined_lambda is None else torch.empty(size, device=device)
    slopes_CV = None if softcap is None else torch.empty(size, device=device)
    for columns in vocabulary_tiles(len(weight_VD), device):
        base_CT = base.logits.tile(chunk, columns)
        memory_CV[:, columns] = logits_of_tile(hidden_CD, weight_VD[columns])
        if slopes_CV is not None and softcap is not None:
            capped_CT = memory_CV[:, columns].div_(softcap).tanh_()
            slopes_CV[:, columns] = 1 - capped_CT.square()
            capped_CT.mul_(softcap)
        if base.is_residual:
            memory_CV[:, columns] += base_CT
        if base_CV is not None:
            base_CV[:, columns] = base_CT
    return _Stored(memory_CV=memory_CV, base_CV=base_CV, slopes_CV=slopes_CV)


@dataclass(frozen=True, kw_only=True)
class _Statistics:
    """Of each row, float32: sums of the powers, log Σ exp of the logits, and KL(p_base ‖ p_mem)."""

    sums_C: Tensor
    log_sums_C: Tensor
    base_sums_C: Tensor
    base_log_sums_C: Tensor
    divergence_C: Tensor


def _exponentiate(stored: _Stored) -> _Statistics:
    """Turn the logits into powers, in place: exp of their distance from the row's greatest."""
    memory_CV, base_CV = stored.memory_CV, stored.base_CV
    greatest_C = memory_CV.amax(1)
    sums_C, differences_C = torch.zeros_like(greatest_C), torch.zeros_like(greatest_C)
    base_sums_C, base_greatest_C = torch.ones_like(greatest_C), greatest_C
    if base_CV is not None:
        base_sums_C, base_greatest_C = torch.zeros_like(greatest_C), base_CV.amax(1)
    for columns in vocabulary_tiles(memory_CV.shape[1], memory_CV.device):
        memory_CT = memory_CV[:, columns].sub_(greatest_C[:, None])
        if base_CV is not None:
            base_CT = base_CV[:, columns].sub_(base_greatest_C[:, None])
            difference_CT = base_CT.clamp_min(_MIN_LOGIT) - memory_CT.clamp_min(_MIN_LOGIT)
            base_CT.mul_(_LOG2_E).exp2_()
            base_sums_C += base_CT.sum(1)
            differences_C += difference_CT.mul_(base_CT).sum(1)
        sums_C += memory_CT.mul_(_LOG2_E).exp2_().sum(1)
    log_sums_C, base_log_sums_C = sums_C.log(), base_sums_C.log()
    return _Statistics(
        sums_C=sums_C,
        log_sums_C=log_sums_C + greatest_C,
        base_sums_C=base_sums_C,
        base_log_sums_C=base_log_sums_C + base_greatest_C,
        divergence_C=differences_C / base_sums_C - base_log_sums_C + log_sums_C,
    )


def _entropy_term(share: float) -> float:
    return share * math.log(share) if share > 0 else 0.0


def _gradient_tiles(
    stored: _Stored, scales_C: Tensor, base_scales_C: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    memory_CV, base_CV = stored.memory_CV, stored.base_CV
    for columns in vocabulary_tiles(memory_CV.shape[1], memory_CV.device):
        d_logits_CT = memory_CV[:, columns] * scales_C[:, None]
        if base_CV is not None:
            d_logits_CT.addcmul_(base_CV[:, columns], base_scales_C[:, None], value=-1)
        if stored.slopes_CV is not None:
            d_logits_CT.mul_(stored.slopes_CV[:, columns])
        yield columns, d_logits_CT.to(dtype)
