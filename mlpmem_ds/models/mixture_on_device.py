"""The mixture of logits on a GPU: `mixture.log_mixture_of_logits` in two Triton launches. Not exported.

Shapes: C rows, V vocabulary.
"""

import torch
from torch import Tensor

from mlpmem_ds.maths import kernels
from mlpmem_ds.models.mixture import check_rows, checked_lmbda, log_mixture_of_logits


@torch.no_grad()
def mixture_on_device(base_logits: Tensor, memory_logits: Tensor, lmbda: float | Tensor) -> Tensor:
    """As `log_mixture_of_logits`, by Triton where the logits lie on CUDA and Triton is installed, else by it;
    by it too where a number λ leaves one side alone.

    Not differentiable.
    """
    is_one_side = not isinstance(lmbda, Tensor) and lmbda in (0.0, 1.0)
    if is_one_side or not kernels.usable(base_logits):
        return log_mixture_of_logits(base_logits, memory_logits, lmbda)
    from mlpmem_ds.maths.kernels.probability_rows import mixture_rows

    check_rows(base_logits, memory_logits, lmbda)
    weight = lmbda.double().reshape(-1) if isinstance(lmbda, Tensor) else checked_lmbda(lmbda)
    base_CV, memory_CV = (
        logits.reshape(-1, logits.shape[-1]).contiguous() for logits in (base_logits, memory_logits)
    )
    return mixture_rows(base_CV, memory_CV, weight).view(base_logits.shape)
