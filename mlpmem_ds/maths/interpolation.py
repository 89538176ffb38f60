"""Pipeline: hidden states and heads → **label log-probabilities, mixture of two models** → evaluation and generation.

Shape legend: N rows, D width of the hidden state, V vocabulary, C rows of a chunk, T columns of a tile of the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from . import kernels
from .products import product, vocabulary_tiles
from .sparse_loss import CUDA_CHUNK_BYTES, DEFAULT_CHUNK_BYTES, row_chunks

_CPU_ROWS = 1024
_ROWS_OF_BLOCK = 16
_LEAST = torch.finfo(torch.float32).min  # for the greatest logit of a tile that is all -inf


def interpolate(log_base: Tensor, log_memory: Tensor, lmbda: float | Tensor) -> Tensor:
    """log((1-λ)·exp(log_base) + λ·exp(log_memory)), elementwise, with broadcasting.

    Exact at λ = 0 and λ = 1, and where either is -inf. λ in [0, 1] is checked only as a float: a tensor may lie on a device.
    """
    if not isinstance(lmbda, Tensor) and not 0 <= lmbda <= 1:
        raise ValueError(f"λ is {lmbda}; an interpolation weight lies in [0, 1]")
    dtype = torch.promote_types(log_base.dtype, log_memory.dtype)
    weight = torch.as_tensor(lmbda, dtype=torch.float64)
    return torch.logaddexp(log_base + torch.log1p(-weight).to(dtype), log_memory + torch.log(weight).to(dtype))


@torch.no_grad()
def mixture_log_probabilities(base_logits: Tensor, memory_logits: Tensor, lmbda: float | Tensor) -> Tensor:
    """log((1-λ) softmax(base) + λ softmax(memory)) over the last dimension, float32, from logits of any floating dtype.

    λ is a number in [0, 1], or has a value for each row (the logits' shape without the last dimension). Exact at λ = 0 and
    λ = 1, and with logits of -inf. Not differentiable. On CUDA two Triton launches, if Triton is installed.
    """
    if base_logits.shape != memory_logits.shape:
        raise ValueError(
            f"logits of the base are {list(base_logits.shape)}, of the memory {list(memory_logits.shape)}; they must agree"
        )
    row_shape = base_logits.shape[:-1]
    if isinstance(lmbda, Tensor) and lmbda.shape != row_shape:
        raise ValueError(f"λ is {list(lmbda.shape)}; it is a number, or one for each of the rows {list(row_shape)}")
    if not kernels.usable(base_logits):
        by_row = lmbda[..., None] if isinstance(lmbda, Tensor) else lmbda
        log_base, log_memory = (logits.float().log_softmax(-1) for logits in (base_logits, memory_logits))
        return interpolate(log_base, log_memory, by_row)
    from .kernels.probability_rows import mixture_rows

    if isinstance(lmbda, Tensor):
        lmbda = lmbda.double().reshape(-1)
    elif not 0 <= lmbda <= 1:
        raise ValueError(f"λ is {lmbda}; an interpolation weight lies in [0, 1]")
    base_CV, memory_CV = (logits.reshape(-1, logits.shape[-1]).contiguous() for logits in (base_logits, memory_logits))
    return mixture_rows(base_CV, memory_CV, lmbda).view(base_logits.shape)


@torch.no_grad()
def label_log_probabilities(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """log softmax(transform(hidden · weightᵀ + bias)) at the labels, float32 [N], without ever holding the logits.

    Operands of 16 bits are multiplied with float32 results: rounded logits would cost up to 2.5e-2 a position, too much for
    a perplexity (measured with bfloat16). ``transform`` is what some bases do to their logits; it must be elementwise (a
    scale, a soft cap). ``chunk_bytes`` bounds the logits in memory (None: as suits the device). On CPU a row's result is
    the same in any batch; on CUDA a Triton kernel does the row work, if Triton is installed.
    """
    device, on_cpu = hidden_ND.device, hidden_ND.device.type == "cpu"
    result_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=device)
    for rows in _row_blocks(len(hidden_ND), len(weight_VD), device, chunk_bytes):
        hidden_CD = _padded(hidden_ND[rows].float()) if on_cpu else hidden_ND[rows]
        labels_C = torch.nn.functional.pad(labels_N[rows], (0, len(hidden_CD) - (rows.stop - rows.start)))
        tiles = _logit_tiles(hidden_CD, weight_VD, bias, transform)
        if kernels.usable(hidden_CD):
            from .kernels.probability_rows import label_rows

            found_C = torch.cat([label_rows(logits_CV.contiguous(), labels_C) for _, logits_CV in tiles])  # one tile
        else:
            found_C = _label_log_probabilities(tiles, labels_C)
        result_N[rows] = found_C[: rows.stop - rows.start]
    return result_N


def _row_blocks(num_rows: int, vocabulary_size: int, device: torch.device, chunk_bytes: int | None) -> Iterator[slice]:
    columns = next((tile.stop for tile in vocabulary_tiles(vocabulary_size, device)), 1)
    if device.type == "cpu":
        chunk_bytes = min(chunk_bytes or DEFAULT_CHUNK_BYTES, 4 * columns * _CPU_ROWS)
    return row_chunks(num_rows, columns, chunk_bytes or CUDA_CHUNK_BYTES)


def _logit_tiles(
    hidden_CD: Tensor, weight_VD: Tensor, bias: Tensor | None, transform: Callable[[Tensor], Tensor] | None
) -> Iterator[tuple[slice, Tensor]]:
    """float32 logits [C, T], a tile of the vocabulary at a time; on a GPU in one."""
    for columns in vocabulary_tiles(len(weight_VD), hidden_CD.device):
        logits_CT = product(hidden_CD, weight_VD[columns].to(hidden_CD.dtype).t())
        if bias is not None:
            logits_CT += bias[columns]
        yield columns, logits_CT if transform is None else transform(logits_CT)


def _label_log_probabilities(tiles: Iterable[tuple[slice, Tensor]], labels_C: Tensor) -> Tensor:
    """log softmax at the labels, float32 [C]. The tiles are overwritten; their normalisers are joined in float64."""
    label_logits_C = torch.zeros(len(labels_C), device=labels_C.device)
    log_sums = []
    for columns, logits_CT in tiles:
        places_C = labels_C - columns.start
        inside_C = (places_C >= 0) & (places_C < logits_CT.shape[1])
        found_C = logits_CT.gather(1, places_C.where(inside_C, 0)[:, None])[:, 0]
        label_logits_C = found_C.where(inside_C, label_logits_C)
        greatest_C1 = logits_CT.amax(1, keepdim=True).clamp_min(_LEAST)
        sums_C = logits_CT.sub_(greatest_C1).exp_().sum(1)
        log_sums.append(greatest_C1[:, 0].double() + sums_C.double().log())
    return (label_logits_C - torch.logsumexp(torch.stack(log_sums), dim=0)).float()


def _padded(hidden_CD: Tensor) -> Tensor:
    """Zero rows up to a whole number of blocks: for a few rows matrix products take another way, with other roundings."""
    return torch.nn.functional.pad(hidden_CD, (0, 0, 0, -len(hidden_CD) % _ROWS_OF_BLOCK))
