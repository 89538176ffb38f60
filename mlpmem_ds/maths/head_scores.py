"""Pipeline: hidden states and a head → **log-probabilities of named tokens, the likeliest token, the
entropy** → evaluation.

One product of hidden states and head serves all of them. The logits come a tile of the vocabulary at a time;
what is kept of a tile is its greatest logit m and the sums of exp(z - m) and of (z - m)·exp(z - m). On CPU a
row's result is the same in any batch, and sums over tiles are in float64.

Shape legend: N rows, D width of the hidden state, V vocabulary, T columns of a tile, C rows of a chunk, J
named tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from . import kernels
from .products import new_logits, vocabulary_tiles
from .sparse_loss import CUDA_CHUNK_BYTES, DEFAULT_CHUNK_BYTES, row_chunks

Transform: TypeAlias = Callable[[Tensor], Tensor]

_MAX_ROWS = 1024
_ROWS_OF_BLOCK = 16
_MIN_GREATEST = torch.finfo(torch.float32).min  # the greatest logit of a tile that is all -inf
_MIN_EXPONENT = -1e4  # exp of it is 0 in float32, and 0 times it is 0, which 0 times -inf is not


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """What a head says of each row; natural logarithms, on the device of the hidden states.

    `log_probabilities_NJ` float32: of the tokens that were asked for. `top_ids_N` int64: the likeliest token
    (one of them, where several are). `top_N` float32: its log-probability. `entropies_N` float32, in nats.
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
    transform: Transform | None = None,
    chunk_bytes: int | None = None,
) -> HeadScores:
    """log softmax(transform(hidden · weightᵀ + bias)): at the tokens, its greatest entry, and its entropy.

    `bias`, `transform` and `chunk_bytes` as in `token_log_probabilities`; at least one row.
    """
    parts = []
    bytes_per_logit = 4 if hidden_ND.device.type == "cpu" else 8  # the logits and their exponentials
    chunks = _chunks(hidden_ND, weight_VD, tokens_NJ, chunk_bytes, bytes_per_logit=bytes_per_logit)
    for rows, hidden_CD, tokens_CJ in chunks:
        named_CJ = torch.zeros(tokens_CJ.shape, device=tokens_CJ.device)
        greatest, places, sums, products = [], [], [], []
        for columns, logits_CT in _tiles(hidden_CD, weight_VD, bias, transform):
            named_CJ = _pick(named_CJ, logits_CT, tokens_CJ, columns)
            greatest_C, place_C = logits_CT.max(1)
            greatest_C = greatest_C.clamp_min(_MIN_GREATEST)
            logits_CT.sub_(greatest_C[:, None])
            exponentials_CT = logits_CT.exp()
            greatest.append(greatest_C.double())
            places.append(place_C + columns.start)
            sums.append(exponentials_CT.sum(1).double())
            products.append(exponentials_CT.mul_(logits_CT.clamp_(min=_MIN_EXPONENT)).sum(1).double())
        greatest_TC = torch.stack(greatest)
        log_sums_C = torch.logsumexp(greatest_TC + torch.stack(sums).log(), dim=0)
        top_C, tile_C = greatest_TC.max(0)
        # H = log Σ e^z - Σ z e^z / Σ e^z, and in a tile Σ z e^z = e^m (Σ (z-m) e^(z-m) + m Σ e^(z-m)).
        weights_TC = (greatest_TC - log_sums_C).exp()
        means_C = (weights_TC * (torch.stack(products) + (greatest_TC - log_sums_C) * torch.stack(sums))).sum(
            0
        )
        top_ids_C = torch.stack(places).gather(0, tile_C[None])[0]
        scores = (
            (named_CJ - log_sums_C[:, None]).float(),
            top_ids_C,
            (top_C - log_sums_C).float(),
            -means_C.float(),
        )
        parts.append([score[: rows.stop - rows.start] for score in scores])
    named_NJ, top_ids_N, top_N, entropies_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return HeadScores(
        log_probabilities_NJ=named_NJ, top_ids_N=top_ids_N, top_N=top_N, entropies_N=entropies_N
    )


@torch.no_grad()
def token_log_probabilities(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_NJ: Tensor,
    *,
    bias: Tensor | None = None,
    transform: Transform | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """log softmax(transform(hidden · weightᵀ + bias)) at the tokens, float32 [N, J], from one product with
    the head.

    Operands of 16 bits are multiplied with float32 results: rounded logits would cost up to 2.5e-2 a
    position, too much for a perplexity (measured with bfloat16). ``transform`` is what some bases do to their
    logits; it must be elementwise (a scale, a soft cap). ``chunk_bytes`` bounds the logits in memory (None:
    as suits the device). On CPU a row's result is the same in any batch; on CUDA a Triton kernel does the row
    work, if Triton is installed.
    """
    result_NJ = torch.empty(tokens_NJ.shape, dtype=torch.float32, device=hidden_ND.device)
    for rows, hidden_CD, tokens_CJ in _chunks(hidden_ND, weight_VD, tokens_NJ, chunk_bytes):
        tiles = _tiles(hidden_CD, weight_VD, bias, transform)
        if kernels.usable(hidden_CD):
            from .kernels.probability_rows import label_rows

            ((_, logits_CV),) = tiles  # a GPU takes the vocabulary in one
            found_CJ = label_rows(logits_CV, tokens_CJ.contiguous())
        else:
            found_CJ = _log_probabilities_of_tiles(tiles, tokens_CJ)
        result_NJ[rows] = found_CJ[: rows.stop - rows.start]
    return result_NJ


def label_log_probabilities(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    transform: Transform | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """`token_log_probabilities` of one token a row, float32 [N]."""
    named_N1 = token_log_probabilities(
        hidden_ND, weight_VD, labels_N[:, None], bias=bias, transform=transform, chunk_bytes=chunk_bytes
    )
    return named_N1[:, 0]


def _log_probabilities_of_tiles(tiles: Iterable[tuple[slice, Tensor]], tokens_CJ: Tensor) -> Tensor:
    """float32 [C, J]. The tiles are overwritten; their normalizers are joined in float64."""
    named_CJ = torch.zeros(tokens_CJ.shape, device=tokens_CJ.device)
    log_sums = []
    for columns, logits_CT in tiles:
        named_CJ = _pick(named_CJ, logits_CT, tokens_CJ, columns)
        greatest_C1 = logits_CT.amax(1, keepdim=True).clamp_min(_MIN_GREATEST)
        log_sums.append(greatest_C1[:, 0].double() + logits_CT.sub_(greatest_C1).exp_().sum(1).double().log())
    return (named_CJ - torch.logsumexp(torch.stack(log_sums), dim=0)[:, None]).float()


def _chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_NJ: Tensor,
    chunk_bytes: int | None,
    *,
    bytes_per_logit: int = 4,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their hidden states and tokens; on CPU these are float32, with rows of zeros up to whole blocks.

    For a few rows matrix products take another way, with other roundings.
    """
    device, on_cpu = hidden_ND.device, hidden_ND.device.type == "cpu"
    width = next((tile.stop for tile in vocabulary_tiles(len(weight_VD), device)), 1)
    if on_cpu:
        chunk_bytes = min(chunk_bytes or DEFAULT_CHUNK_BYTES, bytes_per_logit * width * _MAX_ROWS)
    for rows in row_chunks(
        len(hidden_ND), width, chunk_bytes or CUDA_CHUNK_BYTES, bytes_per_logit=bytes_per_logit
    ):
        hidden_CD, tokens_CJ = hidden_ND[rows], tokens_NJ[rows]
        if on_cpu:
            missing = (0, 0, 0, (rows.start - rows.stop) % _ROWS_OF_BLOCK)
            hidden_CD = torch.nn.functional.pad(hidden_CD.float(), missing)
            tokens_CJ = torch.nn.functional.pad(tokens_CJ, missing)
        yield rows, hidden_CD, tokens_CJ


def _tiles(
    hidden_CD: Tensor, weight_VD: Tensor, bias: Tensor | None, transform: Transform | None
) -> Iterator[tuple[slice, Tensor]]:
    """Columns and their float32 logits [C, T], which the caller may overwrite."""
    for columns in vocabulary_tiles(len(weight_VD), hidden_CD.device):
        logits_CT = new_logits(hidden_CD, weight_VD[columns].to(hidden_CD.dtype))
        if bias is not None:
            logits_CT += bias[columns]
        yield columns, logits_CT if transform is None else transform(logits_CT)


def _pick(named_CJ: Tensor, logits_CT: Tensor, tokens_CJ: Tensor, columns: slice) -> Tensor:
    """The named tokens' logits, with those of this tile filled in."""
    places_CJ = tokens_CJ - columns.start
    inside_CJ = (places_CJ >= 0) & (places_CJ < logits_CT.shape[1])
    return logits_CT.gather(1, places_CJ.where(inside_CJ, 0)).where(inside_CJ, named_CJ)
