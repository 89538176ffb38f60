"""The mixture of two distributions against float64."""

import math

import pytest
import torch

from mlpmem_ds.maths.interpolation import interpolate, mixture_log_probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interpolation_is_the_log_of_the_mixture(dtype):
    base, memory = torch.log_softmax(
        torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0), dtype=dtype), -1
    )
    for lmbda in (0.01, 0.35, 0.99):
        mixture = interpolate(base, memory, lmbda)
        assert mixture.dtype == dtype
        expected = torch.log((1 - lmbda) * base.double().exp() + lmbda * memory.double().exp())
        torch.testing.assert_close(
            mixture.double(), expected, atol=2e-6 if dtype == torch.float32 else 1e-14, rtol=0
        )
        torch.testing.assert_close(
            interpolate(base, memory, torch.tensor(lmbda, dtype=torch.float64)), mixture, rtol=0, atol=0
        )


def test_interpolation_is_exact_at_its_ends_and_at_minus_infinity():
    base = torch.tensor([-1.0, -math.inf, -3.0, -math.inf])
    memory = torch.tensor([-2.0, -5.0, -math.inf, -math.inf])
    assert torch.equal(interpolate(base, memory, 0.0), base)
    assert torch.equal(interpolate(base, memory, 1), memory)
    middle = interpolate(base, memory, 0.25)
    expected = [
        math.log(0.75 * math.exp(-1) + 0.25 * math.exp(-2)),
        math.log(0.25) - 5,
        math.log(0.75) - 3,
        -math.inf,
    ]
    torch.testing.assert_close(middle, torch.tensor(expected))


def test_interpolation_takes_a_grid_of_weights():
    base, memory = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -0.5])
    grid = torch.tensor([[0.0], [0.5], [1.0]])
    curves = interpolate(base, memory, grid)
    assert curves.shape == (3, 2) and torch.equal(curves[0], base) and torch.equal(curves[2], memory)


def test_a_weight_outside_the_unit_interval_is_refused():
    for lmbda in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="λ is"):
            interpolate(torch.zeros(1), torch.zeros(1), lmbda)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mixture_of_logits_is_that_of_their_probabilities(dtype):
    base, memory = torch.randn(2, 2, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    base[0, 0, 4] = -math.inf
    by_row = torch.tensor([[0.0, 0.3, 0.5], [0.9, 1.0, 0.1]])
    for lmbda in (0, 0.25, 1.0, by_row):
        found = mixture_log_probabilities(base, memory, lmbda)
        weight = torch.as_tensor(lmbda, dtype=torch.float64).expand(2, 3)[..., None]
        expected = torch.log((1 - weight) * base.double().softmax(-1) + weight * memory.double().softmax(-1))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(mixture_log_probabilities(base, memory, 0.0), base.float().log_softmax(-1))


def test_mistaken_mixtures_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match=r"\[2, 5\], of the memory \[2, 6\]"):
        mixture_log_probabilities(torch.zeros(2, 5), torch.zeros(2, 6), 0.5)
    with pytest.raises(ValueError, match=r"λ is \[3\]; .* rows \[2\]"):
        mixture_log_probabilities(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(3))
    with pytest.raises(ValueError, match="λ is 1.5"):
        mixture_log_probabilities(torch.zeros(2, 5), torch.zeros(2, 5), 1.5)
