"""Triton twins of the row work in `maths`: one launch where PyTorch makes a dozen passes. Every twin has its
torch original.

`sparse_rows`         loss and gradient of the head's logits, for `sparse_loss`
`probability_rows`    label log-probabilities for `head_scores`, the mixture of two models' logits for
                      `models.mixture_on_device`
`list_candidates`     distances of the lists that queries probe, for `lists_on_device`

Triton is imported only by those files, and they only where `usable` says so: on a CUDA tensor, with
Triton installed. Triton launches on the calling thread's current device, not on that of the tensors: so every
launch stands under `torch.cuda.device_of` of one of them.
"""

import importlib.util
from functools import cache

from torch import Tensor


def usable(tensor: Tensor) -> bool:
    """Whether the twins can work on this tensor."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
