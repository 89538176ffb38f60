"""Rows of the arrays, made where the states are: on pretended GPUs without waiting, on a CPU by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.keys import Codec, bfloat16_bits
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.stages.keys.rows import RowMaker, stored_rows

WIDTH, DIM, POSITIONS = 256, 64, 7
POINTS = {"key": CapturePoint(layer=1), "input": CapturePoint(layer=0)}


def int8_codec() -> Codec:
    random = np.random.default_rng(0)
    rotation = random.standard_normal((WIDTH, DIM)).astype(np.float32)
    return Codec(mean_D=np.zeros(WIDTH, np.float32), rotation_DE=rotation, scale=0.5)


def raw_codec(dtype: str) -> Codec:
    return Codec(mean_D=None, rotation_DE=None, scale=1.0, raw_dtype=dtype)


@pytest.mark.parametrize(
    ("codec", "input_codec", "bytes_each"),
    [
        (int8_codec(), "bf16", DIM + 2 * WIDTH),
        (int8_codec(), "int8", DIM + WIDTH + 4 * 2),
        (raw_codec("float16"), "bf16", 4 * WIDTH + 4),
        (raw_codec("bfloat16"), "bf16", 4 * WIDTH),
    ],
)
def test_only_what_is_stored_leaves_a_gpu_and_nothing_waits(
    codec: Codec, input_codec: str, bytes_each: int
) -> None:
    make = RowMaker(codec=codec, input_codec=input_codec)
    with FakeTensorMode():  # it refuses what needs a number on the host
        for number in range(8):
            device = torch.device("cuda", number)
            states = {
                name: torch.empty(POSITIONS, WIDTH, dtype=torch.bfloat16, device=device) for name in POINTS
            }
            rows = make(states)
            assert {row.device for row in rows.values()} == {device}
            leaving = sum(row.numel() * row.element_size() for row in rows.values())
            assert leaving <= POSITIONS * (bytes_each + 2) + 8  # two flags a position, one count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_cpu_are_those_of_the_formats_own_code(dtype: torch.dtype) -> None:
    states = {
        name: torch.randn(POSITIONS, WIDTH, generator=torch.Generator().manual_seed(number)).to(dtype)
        for number, name in enumerate(POINTS)
    }
    scores = np.zeros(POSITIONS, np.float32)
    for codec in (int8_codec(), raw_codec("float16"), raw_codec("bfloat16")):
        made = RowMaker(codec=codec, input_codec="bf16")(states)
        found = stored_rows(made, scores, range(POSITIONS), POINTS)
        keys, clipped = codec.store(states["key"].float().numpy())
        assert list(found) == ["keys", "inputs"] and found["keys"].dtype == keys.dtype
        np.testing.assert_array_equal(found["keys"], keys)
        np.testing.assert_array_equal(found["inputs"], bfloat16_bits(states["input"].float().numpy()))
        assert int(made.get("clipped", torch.tensor(0))) == clipped


def test_what_cannot_be_stored_is_named() -> None:
    states = {"key": torch.ones(POSITIONS, WIDTH), "input": torch.ones(POSITIONS, WIDTH)}
    positions, scores = range(40, 40 + POSITIONS), np.zeros(POSITIONS, np.float32)
    states["input"][3, 5] = torch.inf
    make = RowMaker(codec=int8_codec(), input_codec="bf16")
    with pytest.raises(UserError, match="the input at position 43, layer 0"):
        stored_rows(make(states), scores, positions, POINTS)
    states["key"][2, 7] = torch.nan
    with pytest.raises(UserError, match="the key at position 42, layer 1"):
        stored_rows(make(states), scores, positions, POINTS)
    large = {"key": torch.ones(POSITIONS, WIDTH)}
    large["key"][4, 8] = -70_000
    raw = RowMaker(codec=raw_codec("float16"), input_codec="none")
    with pytest.raises(UserError, match="the key at position 44, .* holds -70,000, beyond float16's"):
        stored_rows(raw(large), scores, positions, POINTS)
    scores[1] = np.nan
    with pytest.raises(UserError, match="log-probability at position 41"):
        stored_rows(raw({"key": torch.ones(POSITIONS, WIDTH)}), scores, positions, POINTS)
