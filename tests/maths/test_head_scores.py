"""Scores of a head against a dense float64 softmax; the logits are never held for all rows."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlpmem_ds.maths.head_scores import head_scores, token_log_probabilities
from mlpmem_ds.maths.interpolation import label_log_probabilities

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
        assert torch.equal(token_log_probabilities(hidden[rows], weight, tokens[rows], bias=bias), named[rows])
