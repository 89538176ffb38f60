"""Pipeline: hidden states and a head → **log-probabilities of named tokens, the likeliest token, the entropy** → evaluation.

One product of hidden states and head serves all of them. The logits come a tile of the vocabulary at a time; what is kept
of a tile is its greatest logit m and the sums of exp(z - m) and of (z - m)·exp(z - m). On CPU a row's result is the same in
any batch, and sums over tiles are in float64.

Shape legend: N rows, D width of the hidden state, V vocabulary, T columns of a tile, C rows of a chunk, J named tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import product, vocabulary_tiles
from .sparse_loss import DEFAULT_CHUNK_BYTES, row_chunks

_MOST_ROWS = 1024
_ROWS_OF_BLOCK = 16
_LEAST = -1e4  # exp of it is 0 in float32, and 0 times it is 0, which 0 times -inf is not


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """What a head says of each row; natural logarithms, on the device of the hidden states.

    `log_probabilities_NJ` float32: of the tokens that were asked for. `top_ids_N` int64: the likeliest token (one of
    them, where several are). `top_N` float32: its log-probability. `entropies_N` float32, in nats.
    """

    log_probabilities_NJ: Tensor
    top_ids_N: Tensor
    top_N: Tensor
    entropies_N: Tensor


@torch.no_grad()
def head_scores(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_NJ: Tensor,
    *,
    bias: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> HeadScores:
    """log softmax(transform(hidden · weightᵀ + bias)): at the tokens, its greatest entry, and its entropy.

    `bias`, `transform` and `chunk_bytes` as in `label_log_probabilities`.
    """
    parts = []
    for hidden_CD, tokens_CJ, num_rows in _chunks(hidden_ND, weight_VD, tokens_NJ, chunk_bytes):
        named_CJ = torch.zeros(tokens_CJ.shape, device=tokens_CJ.device)
        greatest, places, sums, products = [], [], [], []
        for columns, logits_CT in _tiles(hidden_CD, weight_VD, bias, transform):
            named_CJ = _pick(named_CJ, logits_CT, tokens_CJ, columns)
            greatest_C, place_C = logits_CT.max(1)
            greatest_C = greatest_C.clamp_min(torch.finfo(torch.float32).min)  # a tile may be all -inf
            logits_CT.sub_(greatest_C[:, None])
            exponentials_CT = logits_CT.exp()
            greatest.append(greatest_C.double())
            places.append(place_C + columns.start)
            sums.append(exponentials_CT.sum(1).double())
            products.append(exponentials_CT.mul_(logits_CT.clamp_(min=_LEAST)).sum(1).double())
        greatest_TC = torch.stack(greatest)
        log_sums_C = torch.logsumexp(greatest_TC + torch.stack(sums).log(), dim=0)
        top_C, tile_C = greatest_TC.max(0)
        # H = log Σ e^z - Σ z e^z / Σ e^z, and in a tile Σ z e^z = e^m (Σ (z-m) e^(z-m) + m Σ e^(z-m)).
        weights_TC = (greatest_TC - log_sums_C).exp()
        means_C = (weights_TC * (torch.stack(products) + (greatest_TC - log_sums_C) * torch.stack(sums))).sum(0)
        top_ids_C = torch.stack(places).gather(0, tile_C[None])[0]
        scores = ((named_CJ - log_sums_C[:, None]).float(), top_ids_C, (top_C - log_sums_C).float(), -means_C.float())
        parts.append([score[:num_rows] for score in scores])
    named_NJ, top_ids_N, top_N, entropies_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return HeadScores(log_probabilities_NJ=named_NJ, top_ids_N=top_ids_N, top_N=top_N, entropies_N=entropies_N)


@torch.no_grad()
def token_log_probabilities(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_NJ: Tensor,
    *,
    bias: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """`label_log_probabilities` of several tokens a row, float32 [N, J], from one product with the head."""
    parts = []
    for hidden_CD, tokens_CJ, num_rows in _chunks(hidden_ND, weight_VD, tokens_NJ, chunk_bytes):
        named_CJ = torch.zeros(tokens_CJ.shape, device=tokens_CJ.device)
        logarithms = []
        for columns, logits_CT in _tiles(hidden_CD, weight_VD, bias, transform):
            named_CJ = _pick(named_CJ, logits_CT, tokens_CJ, columns)
            greatest_C1 = logits_CT.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
            logarithms.append(greatest_C1[:, 0].double() + logits_CT.sub_(greatest_C1).exp_().sum(1).double().log())
        parts.append((named_CJ - torch.logsumexp(torch.stack(logarithms), dim=0)[:, None]).float()[:num_rows])
    return torch.cat(parts)


def _chunks(
    hidden_ND: Tensor, weight_VD: Tensor, tokens_NJ: Tensor, chunk_bytes: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Hidden states and tokens of a chunk, on CPU float32 with zero rows up to whole blocks, and the rows that count.

    For a few rows matrix products take another way, with other roundings.
    """
    width = next(vocabulary_tiles(len(weight_VD), hidden_ND.device)).stop
    for rows in row_chunks(len(hidden_ND), width, min(chunk_bytes, 4 * width * _MOST_ROWS)):
        hidden_CD, tokens_CJ, num_rows = hidden_ND[rows], tokens_NJ[rows], rows.stop - rows.start
        if hidden_ND.device.type == "cpu":
            missing = (0, 0, 0, -num_rows % _ROWS_OF_BLOCK)
            hidden_CD = torch.nn.functional.pad(hidden_CD.float(), missing)
            tokens_CJ = torch.nn.functional.pad(tokens_CJ, missing)
        yield hidden_CD, tokens_CJ, num_rows


def _tiles(
    hidden_CD: Tensor, weight_VD: Tensor, bias: Tensor | None, transform: Callable[[Tensor], Tensor] | None
) -> Iterator[tuple[slice, Tensor]]:
    """Columns and their float32 logits [C, T], which the caller may overwrite."""
    for columns in vocabulary_tiles(len(weight_VD), hidden_CD.device):
        logits_CT = product(hidden_CD, weight_VD[columns].to(hidden_CD.dtype).t())
        if bias is not None:
            logits_CT += bias[columns]
        yield columns, logits_CT if transform is None else transform(logits_CT)


def _pick(named_CJ: Tensor, logits_CT: Tensor, tokens_CJ: Tensor, columns: slice) -> Tensor:
    """The named tokens' logits, with those of this tile filled in."""
    places_CJ = tokens_CJ - columns.start
    inside_CJ = (places_CJ >= 0) & (places_CJ < logits_CT.shape[1])
    return logits_CT.gather(1, places_CJ.where(inside_CJ, 0)).where(inside_CJ, named_CJ)
