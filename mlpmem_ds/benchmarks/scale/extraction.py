"""Benchmark `scale`, measures of extraction: what leaves a GPU, counted with tensors that have no content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlpmem_ds.benchmarks.scale.measure import Measure
from mlpmem_ds.formats.keys import Codec
from mlpmem_ds.stages.keys.rows import RowMaker

_GPU = torch.device("cuda", 3)


def bytes_from_gpu_per_byte_stored(
    _work: Path, *, positions: int = 16_384, width: int = 4096, dim: int = 256
) -> float:
    """Of a batch's keys and bfloat16 inputs: bytes copied to the host for each byte on disk.

    What would wait for a number of the device fails here.
    """
    codec = Codec(
        mean_D=np.zeros(width, np.float32), rotation_DE=np.zeros((width, dim), np.float32), scale=1.0
    )
    make = RowMaker(codec=codec, input_codec="bf16")
    with FakeTensorMode():
        states = {
            name: torch.empty(positions, width, dtype=torch.bfloat16, device=_GPU)
            for name in ("key", "input")
        }
        rows = make(states)
        assert all(row.device == _GPU for row in rows.values())
        copied = sum(row.numel() * row.element_size() for row in rows.values())
    return copied / (positions * (dim + 2 * width))


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="bytes_from_gpu_per_byte_stored",
        function=bytes_from_gpu_per_byte_stored,
        goal=1.01,
        direction="at most",
        meaning=(
            "bytes that leave a GPU for each byte of keys (256 numbers) and bfloat16 inputs on disk, with a"
            " base of width 4,096; and nothing on the way waits for the device"
        ),
    ),
)
