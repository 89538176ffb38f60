"""Pipeline: hidden states of a chunk of rows, the base's logits, prepared targets → **its part of a training
loss that needs the base's whole distribution, and of its gradients**.

The base's distribution joins the teacher: KL is that of q = (1-λ) p_base + λ t. The rest of the loss is as
`sparse_loss` says. The gradient of the logits is

    w (s softmax(z) - α (1-λ) p_base - α λ t - c (1-α) onehot(y)),   s = α (1-λ + λ Σ t) + c (1-α),

so p_base takes part at every entry, a tile of the vocabulary at a time. What a chunk holds of its rows is
exp(z - shift) and exp(z_base - shift), float32, each with a shift of its own, as in `sparse_chunk`.

Shape legend: N rows, C rows of the chunk, B width of the base's final state, D width of the memory's, V
vocabulary, T columns of a tile, E stored teacher entries, A the entries and after them the C labels.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import logits_of_tile, vocabulary_tiles
from .sparse_chunk import LN_2, LOG2_E, MAX_SUM, ChunkResult, Named, named_places, stored_tiles, tile_of
from .sparse_targets import PreparedTargets

_MIN_EXPONENT = -1e4  # 2 to its power is 0, and 0 times it is 0, which 0 times -inf is not
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
    """What the base has to do with a loss: `joined_lambda` is the teacher's share λ of what the memory is
    pulled towards."""

    logits: BaseLogits
    joined_lambda: float


def bytes_per_logit(
    device: torch.device, gradient_dtype: torch.dtype | None, softcap: float | None = None
) -> int:
    """What a chunk holds for each of its logits: on a GPU, whose tile is the whole vocabulary, the tile's
    float32 gradient and that in the operands' dtype too."""
    stored = 8 + (4 if softcap is not None else 0)
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
    named = named_places(targets, chunk, weight_VD)
    powers = _Powers.of(hidden_CD, weight_VD, chunk, base, named, softcap)
    num_entries = len(named.teacher_E)
    row_E = named.row_A[:num_entries]
    logs_E, log_prediction_C = powers.log_shares_A[:num_entries], powers.log_shares_A[num_entries:]

    lmbda = base.joined_lambda
    pulled_E = lmbda * named.teacher_E
    at_rest_E = (1 - lmbda) * powers.base_log_shares_A[:num_entries].exp()
    whole_E = at_rest_E + pulled_E  # q where the teacher names it, of which at_rest is the base's part
    kl_C = (1 - lmbda) * powers.divergence_C + _entropy_term(1 - lmbda)
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
    scales_C = mass_C / powers.sums_C
    # The sparse part goes to where the powers stand, in their scale; it is 0 where no mass is.
    inverse_C = torch.where(scales_C > _MIN_SCALE, -1 / scales_C, 0.0)
    powers.memory_store.index_add_(0, named.place_A, shares_A * inverse_C[named.row_A])
    base_scales_C = alphas_C * (1 - lmbda) / powers.base_sums_C
    tiles = _gradient_tiles(
        powers, weight_VD, weights_C * scales_C, weights_C * base_scales_C, gradient_dtype
    )
    return ChunkResult(sums_3=result.sums_3, tiles=tiles, scales_C=None)


def _entropy_term(share: float) -> float:
    return share * math.log(share) if share > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class _Powers:
    """Powers of both distributions, tile after tile, and what was summed while they were made; float32.

    `slopes_store` are derivatives of the memory's soft cap; `log_shares_A` are log p_mem and log p_base
    where the targets name them, `divergence_C` is KL(p_base ‖ p_mem).
    """

    memory_store: Tensor
    base_store: Tensor
    slopes_store: Tensor | None
    sums_C: Tensor
    base_sums_C: Tensor
    log_shares_A: Tensor
    base_log_shares_A: Tensor
    divergence_C: Tensor

    @classmethod
    def of(
        cls,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        chunk: slice,
        base: BasePart,
        named: Named,
        softcap: float | None,
    ) -> "_Powers":
        sizes = len(hidden_CD) * len(weight_VD)
        stores = [torch.empty(sizes, device=hidden_CD.device) for _ in range(2 if softcap is None else 3)]
        logits = _Logits(hidden_CD=hidden_CD, weight_VD=weight_VD, chunk=chunk, base=base, softcap=softcap)
        sums_3C, exponents_2A = _exponentiate(logits, named, stores, None)
        if not bool((sums_3C[:2] <= MAX_SUM).all()):  # a logit far above those of the first tile
            sums_3C, exponents_2A = _exponentiate(logits, named, stores, logits.greatest())
        logs_2C = sums_3C[:2].log2()
        log_shares_2A = (exponents_2A - logs_2C[:, named.row_A]) * LN_2
        return cls(
            memory_store=stores[0],
            base_store=stores[1],
            slopes_store=None if softcap is None else stores[2],
            sums_C=sums_3C[0],
            base_sums_C=sums_3C[1],
            log_shares_A=log_shares_2A[0],
            base_log_shares_A=log_shares_2A[1],
            divergence_C=(sums_3C[2] / sums_3C[1] - logs_2C[1] + logs_2C[0]) * LN_2,
        )


@dataclass(frozen=True, kw_only=True)
class _Logits:
    """Makes the logits of a chunk, of the memory and of the base, a tile at a time."""

    hidden_CD: Tensor
    weight_VD: Tensor
    chunk: slice
    base: BasePart
    softcap: float | None

    def tile(self, columns: slice, slopes_CT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float32 [C, T] of both; the derivatives of the soft cap go to `slopes_CT`."""
        memory_CT = logits_of_tile(self.hidden_CD, self.weight_VD[columns]).float()
        if self.softcap is not None:
            memory_CT = torch.tanh(memory_CT / self.softcap)
            if slopes_CT is not None:
                torch.sub(1, memory_CT.square(), out=slopes_CT)
            memory_CT.mul_(self.softcap)
        return memory_CT, self.base.logits.tile(self.chunk, columns)

    def greatest(self) -> tuple[Tensor, Tensor]:
        """The greatest of each row, of both."""
        tiles = vocabulary_tiles(len(self.weight_VD), self.hidden_CD.device)
        parts = [[logits_CT.amax(1) for logits_CT in self.tile(columns)] for columns in tiles]
        memory, base = zip(*parts, strict=True)
        return torch.stack(memory).amax(0), torch.stack(base).amax(0)


def _exponentiate(
    logits: _Logits, named: Named, stores: list[Tensor], shifts: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """One pass over the vocabulary, which leaves 2^x in the first two stores, x = z log2(e) - shift.

    Returns:
        [3, C]: sums of 2^x of memory and base, and of the base's times the difference of its x and the
        memory's; [2, A]: both x where the targets name them. The shifts are of z; None: the greatest of the
        first tile.
    """
    num_rows, device = len(logits.hidden_CD), logits.hidden_CD.device
    sums_3C = torch.zeros(3, num_rows, device=device)
    place_A, done, parts = named.place_A[named.by_tile_A], 0, []
    tiles = vocabulary_tiles(len(logits.weight_VD), device)
    for columns, num_named in zip(tiles, named.num_by_tile, strict=True):
        memory_CT, base_CT, *slopes = (tile_of(store, num_rows, columns) for store in stores)
        both = logits.tile(columns, *slopes)
        if shifts is None:
            shifts = both[0].amax(1), both[1].amax(1)
        for logits_CT, shift_C, powers_CT in zip(both, shifts, (memory_CT, base_CT), strict=True):
            torch.add((shift_C * -LOG2_E)[:, None], logits_CT, alpha=LOG2_E, out=powers_CT)
        base_CT.clamp_(min=_MIN_EXPONENT)  # tokens that the base rules out
        place = place_A[done : done + num_named] - columns.start * num_rows
        parts.append(torch.stack([memory_CT.view(-1)[place], base_CT.view(-1)[place]]))
        done += num_named
        difference_CT = base_CT - memory_CT
        sums_3C[0] += memory_CT.exp2_().sum(1)
        sums_3C[1] += base_CT.exp2_().sum(1)
        sums_3C[2] += difference_CT.mul_(base_CT).sum(1)
    exponents_2A = torch.empty(2, len(place_A), device=device)
    exponents_2A[:, named.by_tile_A] = torch.cat(parts, dim=1)
    return sums_3C, exponents_2A


def _gradient_tiles(
    powers: _Powers, weight_VD: Tensor, scales_C: Tensor, base_scales_C: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    num_rows = len(scales_C)
    for columns, memory_CT in stored_tiles(powers.memory_store, num_rows, weight_VD):
        base_CT = tile_of(powers.base_store, num_rows, columns)
        d_logits_CT = memory_CT.mul_(scales_C[:, None])
        d_logits_CT.addcmul_(base_CT, base_scales_C[:, None], value=-1)
        if powers.slopes_store is not None:
            d_logits_CT.mul_(tile_of(powers.slopes_store, num_rows, columns))
        yield columns, d_logits_CT.to(dtype)
