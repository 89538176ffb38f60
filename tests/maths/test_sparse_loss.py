"""The sparse loss against dense float64 autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmem_ds.maths.sparse_loss import TargetBatch, row_chunks, sparse_loss

from .dense_loss import check, dense_oracle, make_problem, relative_error


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 37 * 5, 2**28])
@pytest.mark.parametrize("mixture_lambda", [None, 0.25, 1.0])
@pytest.mark.parametrize(("mass", "renormalize"), [(1.0, True), (0.6, True), (0.6, False)])
@pytest.mark.parametrize("duplicates", [True, False])
def test_equals_dense_autograd(chunk_bytes, mixture_lambda, mass, renormalize, duplicates):
    problem = make_problem(mass=mass, duplicates=duplicates)
    check(
        problem,
        tolerance=1e-6,
        mixture_lambda=mixture_lambda,
        renormalize=renormalize,
        chunk_bytes=chunk_bytes,
    )


@pytest.mark.parametrize("mixture_lambda", [None, 0.25])
@pytest.mark.parametrize(("mass", "renormalize"), [(1.0, True), (0.6, True), (0.6, False)])
@pytest.mark.parametrize("duplicates", [True, False])
def test_only_rows_where_the_teacher_is_better_at_the_label(mixture_lambda, mass, renormalize, duplicates):
    hidden, weight, targets = make_problem(num_rows=40, mass=mass, duplicates=duplicates)
    for row in range(2, 40, 2):  # labels that the teacher knows; the others are mostly truncated ones
        if targets.row_weights_N[row]:
            targets.labels_N[row] = targets.ids[targets.offsets_N1[row]]
    check(
        (hidden, weight, targets),
        tolerance=1e-6,
        mixture_lambda=mixture_lambda,
        renormalize=renormalize,
        only_helpful=True,
        chunk_bytes=4 * 37 * 7,
    )
    _, sums = sparse_loss(hidden, weight, targets, alpha=0.4, only_helpful=True)
    _, every = sparse_loss(hidden, weight, targets, alpha=0.4)
    assert 0 < sums.taught < every.taught <= every.weight and sums.kl == every.kl


def test_a_row_is_helpful_by_the_label_alone_and_by_its_stored_probability():
    """p_kNN(y) of .3, .3, 0 and (twice) .2 + .2, against a base of .2, .3, 0.1 and .3."""
    targets = TargetBatch(
        offsets_N1=torch.tensor([0, 1, 2, 3, 6]),
        ids=torch.tensor([5, 5, 4, 7, 5, 5]),
        probabilities=torch.tensor([0.3, 0.3, 0.9, 0.5, 0.2, 0.2]),
        labels_N=torch.full((4,), 5),
        base_log_probabilities_N=torch.tensor([0.2, 0.3, 0.1, 0.3]).log(),
    )
    hidden, weight = torch.zeros(4, 2), torch.zeros(9, 2)  # p_mem is 1/9
    _, sums = sparse_loss(hidden, weight, targets, alpha=0.5, only_helpful=True)
    assert sums.taught == 2 and sums.weight == 4
    loss, _ = sparse_loss(hidden, weight, targets, alpha=1.0, only_helpful=True)
    kl_of_last = math.log(9) + (5 * math.log(5 / 9) + 4 * math.log(4 / 9)) / 9  # of .5 and .4 of .9
    assert float(loss) == pytest.approx(3 * math.log(9) + kl_of_last)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_ends_of_alpha(alpha):
    check(make_problem(seed=2), tolerance=1e-6, alpha=alpha)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(1, 20),
    width=st.integers(1, 12),
    vocabulary=st.integers(2, 50),
    seed=st.integers(0, 10**6),
    mass=st.floats(0.1, 1.0),
    alpha=st.floats(0.05, 0.95),
    mixture_lambda=st.one_of(st.none(), st.floats(0.05, 0.95)),
    renormalize=st.booleans(),
    rows_a_chunk=st.integers(1, 25),
)
def test_any_shape_equals_dense_autograd(
    num_rows, width, vocabulary, seed, mass, alpha, mixture_lambda, renormalize, rows_a_chunk
):
    problem = make_problem(num_rows, width, vocabulary, seed=seed, mass=mass)
    check(
        problem,
        tolerance=1e-6,
        may_cancel=True,
        alpha=alpha,
        mixture_lambda=mixture_lambda,
        renormalize=renormalize,
        chunk_bytes=4 * vocabulary * rows_a_chunk,
    )


@pytest.mark.parametrize("mixture_lambda", [None, 0.25])
@pytest.mark.parametrize("chunk_bytes", [1, 8 * 128 * 5, 2**28])
@pytest.mark.parametrize("scale, softcap, has_bias", [(0.3, None, True), (2.0, 1.5, False), (0.7, 3.0, True)])
def test_bias_scale_and_soft_cap_are_in_the_gradients(scale, softcap, has_bias, chunk_bytes, mixture_lambda):
    """Against autograd through dense float64 logits."""
    hidden, weight, targets = make_problem(mass=0.8)
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(5)) if has_bias else None
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    loss, sums = sparse_loss(
        *leaves[:2],
        targets,
        alpha=0.4,
        mixture_lambda=mixture_lambda,
        chunk_bytes=chunk_bytes,
        bias_V=leaves[2] if has_bias else None,
        scale=scale,
        softcap=softcap,
        divisor=3.0,
    )
    (loss / 7).backward()

    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = scale * (doubles[0] @ doubles[1].t() + (doubles[2] if has_bias else 0))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    identity = torch.eye(len(weight))  # then the hidden states are the logits
    (expected, d_logits, _, kl, ce), _ = dense_oracle(
        logits.detach(), identity, targets, 0.4, mixture_lambda, True
    )
    logits.backward(d_logits)
    assert relative_error(loss.detach() * 3, expected, expected) <= 1e-6
    assert relative_error(sums.kl, kl, kl) <= 1e-6 and relative_error(sums.ce, ce, ce) <= 1e-6
    for leaf, double in zip(leaves, doubles, strict=True):
        assert relative_error(leaf.grad * 21, double.grad, double.grad) <= 2e-6


@pytest.mark.parametrize("mixture_lambda", [None, 0.25])
def test_bfloat16_operands(mixture_lambda):
    problem = make_problem(num_rows=256, width=512, vocabulary=1009, dtype=torch.bfloat16, max_entries=40)
    check(problem, tolerance=4e-3, mixture_lambda=mixture_lambda, chunk_bytes=4 * 1009 * 64)


@pytest.mark.parametrize("mixture_lambda", [None, 0.25])
@pytest.mark.parametrize("chunk_bytes", [4 * 2100 * 16, 2**28])
def test_several_tiles_of_the_vocabulary(mixture_lambda, chunk_bytes):
    problem = make_problem(num_rows=40, width=32, vocabulary=2100, max_entries=60)
    check(problem, tolerance=1e-6, mixture_lambda=mixture_lambda, chunk_bytes=chunk_bytes)


def test_a_responsibility_that_underflows_leaves_no_gradient_and_no_nan():
    hidden, weight, targets = make_problem(num_rows=4, max_entries=1)
    hidden = 100 * hidden
    base = torch.zeros(4)  # the base is certain, the memory all but rules the label out
    labels = (hidden @ weight.t()).argmin(1)
    targets = TargetBatch(
        offsets_N1=torch.zeros(5, dtype=torch.int64),
        ids=torch.zeros(0, dtype=torch.int64),
        probabilities=torch.zeros(0),
        labels_N=labels,
        base_log_probabilities_N=base,
    )
    hidden.requires_grad_()
    loss, _ = sparse_loss(hidden, weight, targets, alpha=0.5, mixture_lambda=0.25)
    loss.backward()
    assert loss.isfinite() and (hidden.grad == 0).all()


def test_logits_do_not_drift_when_the_mass_is_below_one():
    hidden, weight, targets = make_problem(mass=0.6)
    weight = torch.eye(len(weight))  # then the gradient of the hidden states is that of the logits
    hidden = torch.randn(
        len(hidden), len(weight), generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    loss, _ = sparse_loss(hidden, weight, targets, alpha=0.7, renormalize=False)
    loss.backward()
    assert hidden.grad.abs().max() > 0.1
    torch.testing.assert_close(hidden.grad.sum(1), torch.zeros(len(hidden)), atol=1e-6, rtol=0)


def test_rows_without_weight_have_no_gradient_and_no_say():
    hidden, weight, targets = make_problem()
    _, d_hidden, _ = check((hidden, weight, targets), tolerance=1e-6, mixture_lambda=0.3)
    ignored = targets.row_weights_N == 0
    assert ignored.sum() == 2 and (d_hidden[ignored] == 0).all() and (d_hidden[~ignored] != 0).any(1).all()


def test_without_row_weights_every_row_counts_once():
    hidden, weight, targets = make_problem(num_rows=3)
    plain = TargetBatch(
        offsets_N1=targets.offsets_N1,
        ids=targets.ids,
        probabilities=targets.probabilities,
        labels_N=targets.labels_N,
    )
    check((hidden, weight, plain), tolerance=1e-6)
    _, sums = sparse_loss(hidden, weight, plain, alpha=0.5)
    assert sums.weight == 3


def test_only_the_gradients_that_are_asked_for():
    hidden, weight, targets = make_problem()
    both = check((hidden, weight, targets), tolerance=1e-6)
    for ask_hidden in (True, False):
        leaf_hidden, leaf_weight = (
            hidden.clone().requires_grad_(ask_hidden),
            weight.clone().requires_grad_(not ask_hidden),
        )
        loss, _ = sparse_loss(leaf_hidden, leaf_weight, targets, alpha=0.4)
        (loss / 7).backward()
        assert (leaf_weight if ask_hidden else leaf_hidden).grad is None
        assert torch.equal(
            leaf_hidden.grad if ask_hidden else leaf_weight.grad, both[1] if ask_hidden else both[2]
        )
    loss, _ = sparse_loss(hidden, weight, targets, alpha=0.4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, both[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_a_chunk", [4, 100])
def test_a_divisor_divides_the_loss_and_its_gradients(dtype, rows_a_chunk):
    hidden, weight, targets = make_problem(dtype=dtype)
    chunk_bytes = dtype.itemsize * len(weight) * rows_a_chunk
    found = []
    for divisor in (1.0, 7.0):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, sums = sparse_loss(*leaves, targets, alpha=0.4, divisor=divisor, chunk_bytes=chunk_bytes)
        loss.backward()
        found.append(
            [divisor * part.double() for part in (loss.detach(), *(leaf.grad for leaf in leaves))] + [sums.kl]
        )
    for plain, divided in zip(*found, strict=True):
        torch.testing.assert_close(
            divided, plain, rtol=0, atol=4 * torch.finfo(dtype).eps * float(plain.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_logit_far_above_the_first_tile_takes_another_shift(dtype):
    """Exponentials relative to the first tile would overflow; here a row's greatest logit is 150 above
    them."""
    hidden, weight, targets = make_problem(
        num_rows=40, width=32, vocabulary=2100, dtype=dtype, max_entries=60
    )
    weight[1500] = 150 * hidden[4] / hidden[4].float().square().sum()
    check((hidden, weight, targets), tolerance=1e-6 if dtype == torch.float32 else 4e-3)


def test_a_second_backward_is_an_error_not_a_wrong_number():
    hidden, weight, targets = make_problem()
    loss, _ = sparse_loss(hidden.requires_grad_(), weight, targets, alpha=0.4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


def test_no_teacher_at_all_is_cross_entropy():
    hidden, weight, targets = make_problem()
    empty = TargetBatch(
        offsets_N1=torch.zeros(14, dtype=torch.int64),
        ids=torch.zeros(0, dtype=torch.int64),
        probabilities=torch.zeros(0),
        labels_N=targets.labels_N.clamp_min(0),
    )
    loss, sums = sparse_loss(hidden, weight, empty, alpha=0.9)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), empty.labels_N, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert sums.kl == 0 and sums.ce == loss


def test_large_logits_stay_finite():
    hidden, weight, targets = make_problem()
    check((hidden * 300, weight, targets), tolerance=2e-6, mixture_lambda=0.25)


def test_moving_keeps_the_offsets_on_the_host():
    targets = make_problem()[2].to("meta")
    assert targets.offsets_N1.device.type == "cpu" and targets.ids.device.type == "meta"
    assert targets.base_log_probabilities_N.device.type == "meta"


@pytest.mark.parametrize(("num_rows", "most"), [(0, 3), (1, 3), (7, 3), (9, 3), (5, 100)])
def test_chunks_cover_the_rows_within_the_budget(num_rows, most):
    chunks = list(row_chunks(num_rows, 11, 4 * 11 * most))
    assert [row for chunk in chunks for row in range(num_rows)[chunk]] == list(range(num_rows))
    assert all(0 < chunk.stop - chunk.start <= most for chunk in chunks)


def test_mistakes_are_named_with_their_numbers():
    hidden, weight, targets = make_problem()
    with pytest.raises(ValueError, match="width 16, head weights torch.float32 of width 15"):
        sparse_loss(hidden, weight[:, :15], targets, alpha=0.5)
    with pytest.raises(ValueError, match="bfloat16"):
        sparse_loss(hidden, weight.bfloat16(), targets, alpha=0.5)
    with pytest.raises(ValueError, match="12 hidden states, 13 labels, 14 offsets"):
        sparse_loss(hidden[:12], weight, targets, alpha=0.5)
    with pytest.raises(ValueError, match="alpha is 1.5"):
        sparse_loss(hidden, weight, targets, alpha=1.5)
    with pytest.raises(ValueError, match="mixture_lambda is 0"):
        sparse_loss(hidden, weight, targets, alpha=0.5, mixture_lambda=0)
    plain = TargetBatch(
        offsets_N1=targets.offsets_N1,
        ids=targets.ids,
        probabilities=targets.probabilities,
        labels_N=targets.labels_N,
    )
    for options in ({"mixture_lambda": 0.3}, {"only_helpful": True}):
        with pytest.raises(ValueError, match="no base_log_probabilities_N"):
            sparse_loss(hidden, weight, plain, alpha=0.5, **options)
