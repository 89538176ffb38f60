"""Scores of a head against a dense float64 softmax; the logits are never held for all rows."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlpmem_ds.maths.head_scores import head_scores, label_log_probabilities, token_log_probabilities

ROWS, WIDTH, VOCABULARY = 53, 12, 2311  # two tiles on a CPU and a part of one


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    weight = (2 * torch.randn(VOCABULARY, WIDTH, generator=generator)).to(dtype)
    tokens = torch.randint(VOCABULARY, (ROWS, 3), generator=generator)
    return hidden, weight, tokens, torch.randn(VOCABULARY, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_against_a_dense_softmax_in_float64(dtype, chunk_rows):
    hidden, weight, tokens, bias = problem(dtype)
    log_p = (torch.tanh(hidden.double() @ weight.double().t() + bias) * 9).log_softmax(1)
    scores = head_scores(
        hidden,
        weight,
        tokens,
        bias=bias,
        transform=lambda z: torch.tanh(z) * 9,
        chunk_bytes=4 * VOCABULARY * chunk_rows,
    )
    assert (scores.log_probabilities_NJ - log_p.gather(1, tokens)).abs().max() < 1e-5
    named = token_log_probabilities(
        hidden,
        weight,
        tokens,
        bias=bias,
        transform=lambda z: torch.tanh(z) * 9,
        chunk_bytes=4 * VOCABULARY * chunk_rows,
    )
    assert (named - log_p.gather(1, tokens)).abs().max() < 1e-5
    assert (scores.top_N - log_p.max(1).values).abs().max() < 1e-5
    assert (log_p.gather(1, scores.top_ids_N[:, None])[:, 0] - log_p.max(1).values).abs().max() < 1e-5
    assert (scores.entropies_N + (log_p.exp() * log_p).sum(1)).abs().max() < 1e-5


def test_impossible_tokens_and_certainty():
    hidden, weight = torch.eye(2), torch.tensor([[0.0, 50.0], [0.0, 0.0], [float("-inf"), -50.0]])
    scores = head_scores(hidden, weight.nan_to_num(neginf=-1e30), torch.tensor([[2, 0], [0, 1]]))
    assert scores.entropies_N[0] == pytest.approx(0.6931472) and scores.entropies_N[1].abs() < 1e-6
    assert scores.log_probabilities_NJ[0, 0] < -1e29 and scores.log_probabilities_NJ[1, 0] == 0


def test_logits_far_below_zero_are_logits_as_any_others():
    """And so are tiles in which no token is possible."""
    hidden, weight, tokens, bias = problem()
    bias = bias - 2e4
    bias[:1500] = float("-inf")  # the first tile, and a part of the second
    tokens = tokens % 800 + 1500
    log_p = (hidden.double() @ weight.double().t() + bias).log_softmax(1)
    scores = head_scores(hidden, weight, tokens, bias=bias)
    named = token_log_probabilities(hidden, weight, tokens, bias=bias)
    rounding = 0.01  # of float32 logits near -2e4
    for found in (scores.log_probabilities_NJ, named):
        assert (found - log_p.gather(1, tokens)).abs().max() < rounding
    assert (scores.top_N - log_p.max(1).values).abs().max() < rounding
    assert (log_p.gather(1, scores.top_ids_N[:, None])[:, 0] - log_p.max(1).values).abs().max() < rounding
    entropies_N = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(1)
    assert (scores.entropies_N - entropies_N).abs().max() < rounding


def test_the_same_labels_as_the_cheaper_function():
    hidden, weight, tokens, bias = problem()
    expected = label_log_probabilities(hidden, weight, tokens[:, 0], bias=bias)
    found = head_scores(hidden, weight, tokens, bias=bias).log_probabilities_NJ[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_tile_of_logits():
    hidden, weight, tokens, _ = problem()
    for score in (
        lambda: head_scores(hidden, weight, tokens),
        lambda: token_log_probabilities(hidden, weight, tokens),
        lambda: label_log_probabilities(hidden, weight, tokens[:, 0]),
    ):
        with LargestTensor() as largest:
            score()
        assert ROWS * 1024 <= largest.numel <= 64 * 1024 < ROWS * VOCABULARY


def test_a_row_is_the_same_in_any_batch():
    hidden, weight, tokens, bias = problem()
    whole = head_scores(hidden, weight, tokens, bias=bias)
    named = token_log_probabilities(hidden, weight, tokens, bias=bias)
    for rows in (slice(0, 1), slice(7, 24), slice(3, 53)):
        part = head_scores(hidden[rows], weight, tokens[rows], bias=bias)
        for field in ("log_probabilities_NJ", "top_ids_N", "top_N", "entropies_N"):
            assert torch.equal(getattr(part, field), getattr(whole, field)[rows])
        assert torch.equal(
            token_log_probabilities(hidden[rows], weight, tokens[rows], bias=bias), named[rows]
        )


def make_head(num_rows=23, width=32, vocabulary=101, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    labels = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    return hidden, weight, labels


def oracle(hidden, weight, labels, transform=lambda z: z, bias=0):
    logits = transform(hidden.double() @ weight.double().t() + bias)
    return torch.log_softmax(logits, 1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 101 * 5, 2**28])
def test_label_log_probabilities_equal_float64(chunk_bytes):
    hidden, weight, labels = make_head()
    found = label_log_probabilities(hidden, weight, labels, chunk_bytes=chunk_bytes)
    assert found.dtype == torch.float32
    assert (found.double() - oracle(hidden, weight, labels)).abs().max() <= 1e-5


def test_bias_and_transform_are_part_of_the_logits():
    hidden, weight, labels = make_head()
    bias = torch.randn(101, generator=torch.Generator().manual_seed(2))
    found = label_log_probabilities(
        hidden, weight, labels, bias=bias, transform=lambda z: 5 * torch.tanh(z / 5)
    )
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
