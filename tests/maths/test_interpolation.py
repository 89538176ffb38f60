"""Interpolation and label log-probabilities against float64."""

import math

import pytest
import torch

from mlpmem_ds.maths.interpolation import interpolate, label_log_probabilities, mixture_log_probabilities


def make_head(num_rows=23, width=32, vocabulary=101, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    labels = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    return hidden, weight, labels


def oracle(hidden, weight, labels, transform=lambda z: z, bias=0):
    logits = transform(hidden.double() @ weight.double().t() + bias)
    return torch.log_softmax(logits, 1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interpolation_is_the_log_of_the_mixture(dtype):
    base, memory = torch.log_softmax(torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0), dtype=dtype), -1)
    for lmbda in (0.01, 0.35, 0.99):
        mixture = interpolate(base, memory, lmbda)
        assert mixture.dtype == dtype
        expected = torch.log((1 - lmbda) * base.double().exp() + lmbda * memory.double().exp())
        torch.testing.assert_close(mixture.double(), expected, atol=2e-6 if dtype == torch.float32 else 1e-14, rtol=0)
        torch.testing.assert_close(
            interpolate(base, memory, torch.tensor(lmbda, dtype=torch.float64)), mixture, rtol=0, atol=0
        )


def test_interpolation_is_exact_at_its_ends_and_at_minus_infinity():
    base = torch.tensor([-1.0, -math.inf, -3.0, -math.inf])
    memory = torch.tensor([-2.0, -5.0, -math.inf, -math.inf])
    assert torch.equal(interpolate(base, memory, 0.0), base)
    assert torch.equal(interpolate(base, memory, 1), memory)
    middle = interpolate(base, memory, 0.25)
    expected = [math.log(0.75 * math.exp(-1) + 0.25 * math.exp(-2)), math.log(0.25) - 5, math.log(0.75) - 3, -math.inf]
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


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 101 * 5, 2**28])
def test_label_log_probabilities_equal_float64(chunk_bytes):
    hidden, weight, labels = make_head()
    found = label_log_probabilities(hidden, weight, labels, chunk_bytes=chunk_bytes)
    assert found.dtype == torch.float32
    assert (found.double() - oracle(hidden, weight, labels)).abs().max() <= 1e-5


def test_bias_and_transform_are_part_of_the_logits():
    hidden, weight, labels = make_head()
    bias = torch.randn(101, generator=torch.Generator().manual_seed(2))
    found = label_log_probabilities(hidden, weight, labels, bias=bias, transform=lambda z: 5 * torch.tanh(z / 5))
    expected = oracle(hidden, weight, labels, transform=lambda z: 5 * torch.tanh(z / 5), bias=bias.double())
    assert (found.double() - expected).abs().max() <= 1e-5
    assert (found.double() - oracle(hidden, weight, labels)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_keep_float32_logits(dtype):
    hidden, weight, labels = make_head(num_rows=9, width=64, vocabulary=8192 + 5, dtype=dtype)
    labels[0] = 8192 + 4
    found = label_log_probabilities(hidden, weight, labels)
    assert (found.double() - oracle(hidden, weight, labels)).abs().max() <= 2e-5


def test_no_gradient_is_kept_and_the_operands_are_left_alone():
    hidden, weight, labels = make_head()
    hidden_before, weight = hidden.clone(), weight.requires_grad_()
    assert not label_log_probabilities(hidden, weight, labels).requires_grad
    assert torch.equal(hidden, hidden_before)


def test_a_row_has_the_same_result_in_any_batch_to_the_last_bit():
    hidden, weight, labels = make_head(num_rows=70, width=64, vocabulary=2100)
    whole = label_log_probabilities(hidden, weight, labels)
    for size in (1, 5, 16, 33):
        parts = [
            label_log_probabilities(hidden[start : start + size], weight, labels[start : start + size])
            for start in range(0, 70, size)
        ]
        assert torch.equal(torch.cat(parts), whole), size


def test_a_tile_of_impossible_tokens_and_labels_of_every_tile():
    hidden, weight, _ = make_head(num_rows=6, vocabulary=3000)
    labels = torch.tensor([0, 1023, 1024, 2047, 2048, 2999])
    bias = torch.zeros(3000)
    bias[1024:2048] = -math.inf
    found = label_log_probabilities(hidden, weight, labels, bias=bias)
    expected = oracle(hidden, weight, labels, bias=bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert (found[2:4] == -math.inf).all() and found[[0, 1, 4, 5]].isfinite().all()


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
