"""Pipeline: hidden states and heads → **label log-probabilities, mixture of two models** → evaluation and generation.

Shape legend: N rows, D width of the hidden state, V vocabulary, C rows of a chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .sparse_loss import DEFAULT_CHUNK_BYTES, row_chunks

_VOCABULARY_SLICE = 8192


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
def label_log_probabilities(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """log softmax(transform(hidden · weightᵀ + bias)) at the labels, float32 [N]; float32 logits, a chunk of rows at a time.

    Operands of 16 bits are multiplied with float32 results: rounded logits would cost up to 2.5e-2 a position, too much for
    a perplexity (measured with bfloat16). ``transform`` is what some bases do to their logits (an elementwise scale or
    soft cap). ``chunk_bytes`` bounds the logits in memory.
    """
    result_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    for rows in row_chunks(len(hidden_ND), len(weight_VD), chunk_bytes):
        logits_CV = _float32_logits(hidden_ND[rows], weight_VD)
        if bias is not None:
            logits_CV += bias
        if transform is not None:
            logits_CV = transform(logits_CV)
        label_logits_C = logits_CV.gather(1, labels_N[rows, None])[:, 0]
        greatest_C1 = logits_CV.amax(1, keepdim=True)
        sums_C = logits_CV.sub_(greatest_C1).exp_().sum(1)
        result_N[rows] = label_logits_C - greatest_C1[:, 0] - sums_C.log_()
    return result_N


def _float32_logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    if weight_VD.dtype == torch.float32:
        return hidden_CD @ weight_VD.t()
    if weight_VD.is_cuda:
        return torch.mm(hidden_CD, weight_VD.t(), out_dtype=torch.float32)
    # On CPU a 16-bit product has a 16-bit result, so the operands are widened, a slice of the vocabulary at a time.
    logits_CV = torch.empty(len(hidden_CD), len(weight_VD))
    for start in range(0, len(weight_VD), _VOCABULARY_SLICE):
        columns = slice(start, start + _VOCABULARY_SLICE)
        logits_CV[:, columns] = hidden_CD.float() @ weight_VD[columns].float().t()
    return logits_CV
