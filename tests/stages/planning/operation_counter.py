"""Counts multiplications and additions of matrix products, as PyTorch's dispatcher meets them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlpmem_ds.maths import distances

# operator → where its left factor [..., M, K] stands among its arguments; the right one follows
_LEFT = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "_linear_pointwise": 0, "linear": 0}
_TRANSPOSED = {"_linear_pointwise", "linear"}


class OperationCounter(TorchDispatchMode):
    """While it is open, `total` grows by two operations for each product of two numbers; in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        if name in _LEFT:
            left, right = args[_LEFT[name]], args[_LEFT[name] + 1]
            self.total += 2 * left.numel() * right.shape[-2 if name in _TRANSPOSED else -1]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_distances() -> Iterator[list[int]]:
    """While it is open, the list grows by the operations of each product of int8 codes, from any thread."""
    counts: list[int] = []
    products = distances._integer_products

    def counting(queries_QD: torch.Tensor, keys_KD: torch.Tensor, *others: Any) -> torch.Tensor:
        counts.append(2 * queries_QD.numel() * len(keys_KD))
        return products(queries_QD, keys_KD, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "_integer_products", counting)
        yield counts
