"""Codes made by torch, as on a GPU, against the NumPy code that a CPU runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlpmem_ds.formats.keys import INPUT_GROUP, Codec, dequantize_inputs
from mlpmem_ds.maths.codec import MassiveDimension, fit_codec
from mlpmem_ds.maths.encoding import codec_on_device, encode_states, quantize_groups

CPU = torch.device("cpu")
MASSIVE = (MassiveDimension(dimension=3, low=-2.3, high=1.7, largest=900.0),)


def quantized(inputs_nI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = quantize_groups(torch.from_numpy(inputs_nI), INPUT_GROUP)
    return codes.numpy(), scales.numpy()


@pytest.mark.parametrize("massive", [(), MASSIVE])
def test_codes_of_sums_without_rounding_are_equal(massive: tuple[MassiveDimension, ...]) -> None:
    """With numbers that float32 adds exactly in any order, every bit is the same, also of clipped numbers."""
    random = np.random.default_rng(0)
    states = random.integers(-64, 64, (200, 24)).astype(np.float32) / 8
    states[::7, 3] = 900
    mean = random.integers(-8, 8, 24).astype(np.float32) / 8
    rotation = random.integers(-4, 5, (24, 6)).astype(np.float32) / 4
    if massive:
        massive = (MassiveDimension(dimension=3, low=-2.25, high=1.75, largest=900.0),)
    codec = Codec(mean_D=mean, rotation_DE=rotation, scale=0.25, massive=massive)
    expected, clipped = codec.store(states)
    found, found_clipped = encode_states(
        torch.from_numpy(states), codec_on_device(mean, rotation, 0.25, massive, CPU)
    )
    np.testing.assert_array_equal(found.numpy(), expected)
    assert int(found_clipped) == clipped > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_states_differ_on_an_edge_alone(dtype: torch.dtype) -> None:
    states = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    states[::50, 3] = 300
    sample = states.float().numpy()
    fitted = fit_codec(sample, 16, seed=0)
    assert fitted.massive
    mean, rotation = fitted.mean_D.astype(np.float32), fitted.rotation_DE.astype(np.float32)
    codec = Codec(mean_D=mean, rotation_DE=rotation, scale=fitted.scale, massive=fitted.massive)
    expected, clipped = codec.store(sample)
    device_codec = codec_on_device(mean, rotation, fitted.scale, fitted.massive, CPU)
    found, found_clipped = encode_states(states, device_codec)
    different = found.numpy() != expected
    assert different.mean() < 1e-4
    assert np.abs(found.numpy().astype(int) - expected)[different].max(initial=0) <= 1
    assert abs(int(found_clipped) - clipped) <= different.sum()


def test_nothing_waits_for_the_device() -> None:
    """A fake GPU refuses what needs a number on the host; all results lie on the GPU of the states."""
    with FakeTensorMode():
        for number in range(8):
            device = torch.device("cuda", number)
            states = torch.empty(5, 24, dtype=torch.bfloat16, device=device)
            codec = codec_on_device(
                np.zeros(24, np.float32), np.zeros((24, 6), np.float32), 0.5, MASSIVE, device
            )
            codes, clipped = encode_states(states, codec)
            inputs, scales = quantize_groups(torch.empty(5, 256, device=device), INPUT_GROUP)
            assert {part.device for part in (codes, clipped, inputs, scales)} == {device}
            assert codes.shape == (5, 6) and codes.dtype == torch.int8
            assert inputs.shape == (5, 256) and scales.shape == (5, 2)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300])
def test_int8_inputs_are_those_of_numpy(size: int) -> None:
    """Bit for bit: every operation is rounded as IEEE says."""
    inputs_nI = (10 * np.random.default_rng(size).standard_normal((50, size))).astype(np.float32)
    inputs_nI[3] = 0
    codes_nI, scales_nG = quantized(inputs_nI)
    for group, first in enumerate(range(0, size, INPUT_GROUP)):
        part = inputs_nI[:, first : first + INPUT_GROUP]
        scales = np.abs(part).max(axis=1) / np.float32(127)
        divisors = np.where(scales > 0, scales, np.float32(1))[:, None]
        np.testing.assert_array_equal(scales_nG[:, group], scales)
        np.testing.assert_array_equal(
            codes_nI[:, first : first + INPUT_GROUP], np.clip(np.rint(part / divisors), -127, 127)
        )


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300])
def test_int8_inputs_are_within_half_a_step_of_their_group(size: int) -> None:
    inputs_nI = np.random.default_rng(size).standard_normal((20, size)).astype(np.float32)
    inputs_nI[3] = 0
    codes_nI, scales_nG = quantized(inputs_nI)
    assert codes_nI.dtype == np.int8 and codes_nI.shape == inputs_nI.shape
    assert scales_nG.dtype == np.float32 and scales_nG.shape == (20, -(-size // 128))
    for group in range(scales_nG.shape[1]):
        columns = slice(128 * group, 128 * (group + 1))
        np.testing.assert_allclose(scales_nG[:, group], np.abs(inputs_nI[:, columns]).max(1) / 127, rtol=1e-6)
        errors = np.abs(codes_nI[:, columns] * scales_nG[:, group : group + 1] - inputs_nI[:, columns])
        assert (errors <= 0.5001 * scales_nG[:, group : group + 1]).all()
    np.testing.assert_array_equal(
        dequantize_inputs(codes_nI, scales_nG), codes_nI * np.repeat(scales_nG, 128, axis=1)[:, :size]
    )
    assert not dequantize_inputs(codes_nI, scales_nG)[3].any()


def test_a_massive_number_of_an_input_costs_its_own_group_alone() -> None:
    inputs_nI = np.random.default_rng(0).standard_normal((10, 256)).astype(np.float32)
    inputs_nI[:, 5] = 4000
    found = dequantize_inputs(*quantized(inputs_nI))
    np.testing.assert_allclose(found[:, 5], 4000, rtol=1e-6)
    assert np.abs(found[:, 128:] - inputs_nI[:, 128:]).max() < 0.02
