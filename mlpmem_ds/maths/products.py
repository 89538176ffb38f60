"""Pipeline: under the training loss and the label log-probabilities → **matrix products with float32
results**.

PyTorch multiplies float32 on CPU with MKL, which uses half of the vector width where the processor is not
Intel's: 110 GFLOP/s a core on an AMD EPYC of family 26, where oneDNN, which PyTorch brings as well, does 220
with the same error (both measured with PyTorch 2.13); on family 25, whose units are half as wide, 86 and 100.
So large products go to oneDNN where the processor has AVX-512. The operator is PyTorch's own, made for its
compiler; where a release lacks it, MKL does the work.

Shape legend: M, K, N any; T columns of a tile of the vocabulary; C rows of a chunk; D width; V vocabulary.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# A tile of 1024 rows by 1024 columns (4 MB) stays in the cache while it is made, copied and multiplied.
_TILE_COLUMNS = 1024
_CACHED_BYTES = 2**21
# For a smaller right operand the half millisecond that oneDNN takes to make a kernel for a new shape is not
# worth it. The rows of the left one have no say: each row's result should be the same in any batch.
_MIN_SIZE = 2**14


def vocabulary_tiles(vocabulary_size: int, device: torch.device) -> Iterator[slice]:
    """Slices over the vocabulary: tiles that fit a processor's cache, or all of it on a GPU, whose cache they
    would not meet."""
    columns = _TILE_COLUMNS if device.type == "cpu" else max(1, vocabulary_size)
    for start in range(0, vocabulary_size, columns):
        yield slice(start, min(start + columns, vocabulary_size))


def cached_rows(matrix_MN: Tensor) -> Iterator[slice]:
    """Slices over the rows, for several passes over each: few enough for a processor's cache, or all of them
    on a GPU."""
    rows = len(matrix_MN)
    if matrix_MN.device.type == "cpu":
        rows = max(1, _CACHED_BYTES // max(1, matrix_MN.shape[1] * matrix_MN.element_size()))
    for start in range(0, len(matrix_MN), max(1, rows)):
        yield slice(start, min(start + rows, len(matrix_MN)))


def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """float32 left · right. Not differentiable.

    On CPU PyTorch cannot widen the result of 16-bit operands, so it is rounded to 16 bits first.
    """
    if left_MK.is_cuda and left_MK.dtype != torch.float32:
        return torch.mm(left_MK, right_KN, out_dtype=torch.float32)
    return _unwidened_product(left_MK, right_KN).float()


def logits_of_tile(hidden_CD: Tensor, weight_TD: Tensor) -> Tensor:
    """hidden · weightᵀ, not differentiable: float32, or the operands' 16 bits on CPU, which whoever widens it
    does anyway."""
    if hidden_CD.is_cuda:
        return product(hidden_CD, weight_TD.t())
    return _unwidened_product(hidden_CD, weight_TD.t())


def _unwidened_product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """The same as `product` on CPU, in the operands' dtype."""
    if _suits_onednn(left_MK, right_KN):
        result_MN: Tensor = torch.ops.mkldnn._linear_pointwise(left_MK, right_KN.t(), None, "none", [], "")
        return result_MN
    return torch.mm(left_MK, right_KN)


def set_transposed_product(total_NM: Tensor, left_MK: Tensor, right_KN: Tensor, *, accumulate: bool) -> None:
    """total = (left · right)ᵀ, or += it, in place; ``total_NM`` is float32, or where nothing is added of the
    operands' dtype."""
    if not accumulate and left_MK.dtype == total_NM.dtype != torch.float32:
        torch.mm(right_KN.t(), left_MK.t(), out=total_NM)
    elif left_MK.is_cuda and left_MK.dtype != torch.float32:
        _set_widened_product(total_NM, right_KN.t(), left_MK.t(), accumulate)
    elif _suits_onednn(left_MK, right_KN):
        result_NM = product(left_MK, right_KN).t()
        if accumulate:
            total_NM += result_NM.contiguous()  # a copy first: 1.1 times faster than adding across
        else:
            total_NM.copy_(result_NM)
    elif left_MK.dtype == torch.float32:
        total_NM.addmm_(right_KN.t(), left_MK.t(), beta=1 if accumulate else 0)
    else:
        result_NM = _unwidened_product(right_KN.t(), left_MK.t())
        total_NM.add_(result_NM) if accumulate else total_NM.copy_(result_NM)


def _set_widened_product(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor, accumulate: bool) -> None:
    if not accumulate:
        torch.mm(left_MK, right_KN, out_dtype=torch.float32, out=total_MN)
        return
    try:  # one pass over the total, where `+=` makes three
        torch.addmm(total_MN, left_MK, right_KN, out_dtype=torch.float32, out=total_MN)
    except RuntimeError:  # older releases want a total of 16 bits
        total_MN += product(left_MK, right_KN)


def fill_logits(logits_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
    """Write float32 hidden · weightᵀ into ``logits_CV``, a tile at a time: a fresh tensor a chunk would cost
    page faults."""
    if logits_CV.is_cuda:
        widened = {} if hidden_CD.dtype == torch.float32 else {"out_dtype": torch.float32}
        torch.mm(hidden_CD, weight_VD.t(), **widened, out=logits_CV)
        return
    for columns in vocabulary_tiles(len(weight_VD), logits_CV.device):
        logits_CV[:, columns] = _unwidened_product(hidden_CD, weight_VD[columns].t())


def _suits_onednn(left_MK: Tensor, right_KN: Tensor) -> bool:
    """Whether oneDNN is there and does well: it falls to a reference loop, 2000 times slower, where rows have
    gaps."""
    return (
        left_MK.device.type == "cpu"
        and left_MK.dtype == torch.float32
        and right_KN.numel() >= _MIN_SIZE
        and (right_KN.is_contiguous() or right_KN.t().is_contiguous())
        and _has_onednn()
    )


@cache
def _has_onednn() -> bool:
    return (
        torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
