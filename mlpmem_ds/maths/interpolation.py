"""Pipeline: logits or log-probabilities of base and memory → **the mixture of both** → evaluation and
generation.

Shape legend: C rows, V vocabulary.
"""

import torch
from torch import Tensor

from . import kernels


def interpolate(log_base: Tensor, log_memory: Tensor, lmbda: float | Tensor) -> Tensor:
    """log((1-λ)·exp(log_base) + λ·exp(log_memory)), elementwise, with broadcasting.

    Exact at λ = 0 and λ = 1, and where either is -inf. λ in [0, 1] is checked only as a float: a tensor may
    lie on a device.
    """
    if not isinstance(lmbda, Tensor) and not 0 <= lmbda <= 1:
        raise ValueError(f"λ is {lmbda}; an interpolation weight lies in [0, 1]")
    dtype = torch.promote_types(log_base.dtype, log_memory.dtype)
    weight = torch.as_tensor(lmbda, dtype=torch.float64)
    return torch.logaddexp(
        log_base + torch.log1p(-weight).to(dtype), log_memory + torch.log(weight).to(dtype)
    )


@torch.no_grad()
def mixture_log_probabilities(base_logits: Tensor, memory_logits: Tensor, lmbda: float | Tensor) -> Tensor:
    """log((1-λ) softmax(base) + λ softmax(memory)) over the last dimension, float32, from logits of any
    floating dtype.

    λ is a number in [0, 1], or has a value for each row (the logits' shape without the last dimension). Exact
    at λ = 0 and λ = 1, and with logits of -inf. Not differentiable. On CUDA two Triton launches, if Triton is
    installed.
    """
    if base_logits.shape != memory_logits.shape:
        raise ValueError(
            f"logits of the base are {list(base_logits.shape)}, of the memory {list(memory_logits.shape)};"
            " they must agree"
        )
    row_shape = base_logits.shape[:-1]
    if isinstance(lmbda, Tensor) and lmbda.shape != row_shape:
        raise ValueError(
            f"λ is {list(lmbda.shape)}; it is a number, or one for each of the rows {list(row_shape)}"
        )
    if not kernels.usable(base_logits):
        by_row = lmbda[..., None] if isinstance(lmbda, Tensor) else lmbda
        log_base, log_memory = (logits.float().log_softmax(-1) for logits in (base_logits, memory_logits))
        return interpolate(log_base, log_memory, by_row)
    from .kernels.probability_rows import mixture_rows

    if isinstance(lmbda, Tensor):
        lmbda = lmbda.double().reshape(-1)
    elif not 0 <= lmbda <= 1:
        raise ValueError(f"λ is {lmbda}; an interpolation weight lies in [0, 1]")
    base_CV, memory_CV = (
        logits.reshape(-1, logits.shape[-1]).contiguous() for logits in (base_logits, memory_logits)
    )
    return mixture_rows(base_CV, memory_CV, lmbda).view(base_logits.shape)
