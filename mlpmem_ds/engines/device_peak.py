"""FLOP/s of a device at best: the denominator of MFU (model FLOPs utilization).

By the device's name where its data sheet is listed (dense, bfloat16), else by a measured matrix product.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

# Dense bfloat16 FLOP/s of the data sheets; the longest name whose words are in the device's wins.
_BFLOAT16_PEAKS = {
    "B200": 2.25e15,
    "GH200": 9.89e14,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100 NVL": 8.35e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "L40": 1.81e14,
    "L4": 1.21e14,
    "A10G": 7.0e13,
    "MI300X": 1.307e15,
}
_SLOWER = ("H200 NVL", "MIG")  # than the listed GPU whose name theirs has; MIG: a part of one
_SIZES = {"cpu": 768, "cuda": 8192}
_MEASURED_PRODUCTS = 5


@dataclass(frozen=True, kw_only=True)
class Peak:
    """FLOP/s of one device (of one rank's threads on a CPU), and where the number comes from."""

    flops: float
    source: str


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak for products of `dtype`: by name for bfloat16 on a listed GPU, else the best of a few measured
    ones."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        listed = [key for key in _BFLOAT16_PEAKS if _has_words(name, key)]
        if listed and not any(_has_words(name, slower) for slower in _SLOWER):
            flops = _BFLOAT16_PEAKS[max(listed, key=len)]
            return Peak(flops=flops, source=f"the data sheet's peak of {name}")
    return Peak(flops=measure_peak(device, dtype), source="a matrix product measured here")


def _has_words(name: str, words: str) -> bool:
    return re.search(rf"\b{words}\b", name) is not None


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square products."""
    size = _SIZES.get(device.type, 4096)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_MEASURED_PRODUCTS + 1):  # the first warms up, and is never the fastest
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
