"""Pipeline: under the training loss and the label log-probabilities → **matrix products with float32
results**.

PyTorch multiplies float32 on CPU with MKL, which uses half of the vector width where the processor is not
Intel's: 110 GFLOP/s a core on an AMD EPYC of family 26, where oneDNN, which PyTorch brings as well, does 220
with the same error (both measured with PyTorch 2.13); on family 25, whose units are half as wide, 86 and 100.
So large products go to oneDNN where the processor has AVX-512. The operator is PyTorch's own, made for its
compiler; where a release lacks it, MKL does the work.

Shape legend: M, K, N any; T columns of a tile of the vocabulary; C rows of a chunk; D width; V vocabulary.
"""

import logging
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

# A tile of 1024 rows by 1024 columns (4 MB) stays in the cache while it is made, copied and multiplied.
_TILE_COLUMNS = 1024
_CACHED_BYTES = 2**21
# For a smaller right operand the half millisecond that oneDNN takes to make a kernel for a new shape is not
# worth it. The rows of the left one have no say: each row's result should be the same in any batch.
_MIN_SIZE = 2**14
# Tensor cores take rows that start at multiples of 16 bytes, which those of 50,257 numbers do not. 128
# numbers are 256 bytes or more, a multiple of what any GPU asks.
_ROW_MULTIPLE = 128


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


def padded_columns(columns: int) -> int:
    """Numbers from the start of a row to that of the next, in a matrix of logits on a GPU."""
    return -(-columns // _ROW_MULTIPLE) * _ROW_MULTIPLE


def padded_rows(store: Tensor, rows: int, columns: int) -> Tensor:
    """The start of a flat store as a matrix [rows, columns] whose rows begin `padded_columns` apart."""
    width = padded_columns(columns)
    return store[: rows * width].view(rows, width)[:, :columns]


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
    elif adds_to_wider_total(left_MK.dtype, left_MK.device):
        torch.addmm(total_MN, left_MK, right_KN, out_dtype=torch.float32, out=total_MN)
    else:
        total_MN += product(left_MK, right_KN)


@cache
def adds_to_wider_total(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `addmm` adds a product of 16-bit operands to a float32 total; older releases refuse. Tried
    once."""
    operand_KK = torch.zeros(16, 16, dtype=dtype, device=device)
    total_KK = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total_KK, operand_KK, operand_KK, out_dtype=torch.float32, out=total_KK)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        _logger.warning(
            "PyTorch %s cannot add products of %s to a float32 total (%s): the gradient of the head's weight"
            " takes three passes over it a chunk instead of one",
            torch.__version__,
            dtype,
            reason,
        )
        return False
    _logger.info("products of %s are added to a float32 total in one pass", dtype)
    return True


def new_logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """float32 hidden · weightᵀ, not differentiable; on a GPU in rows that its tensor cores take."""
    if not hidden_CD.is_cuda:
        return product(hidden_CD, weight_VD.t())
    rows, columns = len(hidden_CD), len(weight_VD)
    store = torch.empty(rows * padded_columns(columns), device=hidden_CD.device)
    logits_CV = padded_rows(store, rows, columns)
    fill_logits(logits_CV, hidden_CD, weight_VD)
    return logits_CV


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
