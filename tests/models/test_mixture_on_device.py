"""Which mixtures go to Triton, with a kernel that only notes its calls; what it computes is in
tests/maths/kernels/test_twins.py."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from mlpmem_ds.maths import kernels
from mlpmem_ds.models.mixture_on_device import mixture_on_device


def test_the_ends_are_one_side_alone_without_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[float | torch.Tensor] = []

    def mixture_rows(base: torch.Tensor, memory: torch.Tensor, lmbda: float | torch.Tensor) -> torch.Tensor:
        launched.append(lmbda)
        return base + memory

    fake = SimpleNamespace(mixture_rows=mixture_rows)
    monkeypatch.setitem(sys.modules, "mlpmem_ds.maths.kernels.probability_rows", fake)
    monkeypatch.setattr(kernels, "usable", lambda _: True)
    good, bad = torch.randn(2, 3, 9), torch.full((2, 3, 9), torch.nan)
    for base, memory, lmbda in ((good, bad, 0), (good, bad, 0.0), (bad, good, 1), (bad, good, 1.0)):
        assert torch.equal(mixture_on_device(base, memory, lmbda), torch.log_softmax(good, -1))
    assert not launched
    for refused in (True, -0.1, 1.5):
        with pytest.raises(ValueError, match="a number in"):
            mixture_on_device(good, good, refused)
    mixture_on_device(good, good, 0.25)
    mixture_on_device(good, good, torch.zeros(2, 3))
    assert launched[0] == 0.25 and len(launched) == 2
