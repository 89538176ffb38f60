"""Losses that need the base's whole distribution, against dense float64 autograd."""

import math

import pytest
import torch

from mlpmem_ds.maths.based_chunk import BaseLogits, BasePart
from mlpmem_ds.maths.sparse_loss import TargetBatch, sparse_loss

from .dense_loss import dense_targets

WIDTH, BASE_WIDTH = 16, 12


def make_problem(num_rows=13, vocabulary=37, dtype=torch.float32, mass=1.0, transform=None, spread=1.0):
    """Rows with repeated and unordered ids, an empty row, ignored rows, a token that the base rules out."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (num_rows,), generator=generator)
    counts[1] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    row_of_entry = torch.repeat_interleave(counts)
    ids = torch.randint(0, vocabulary, (len(row_of_entry),), generator=generator)
    ids[1::2] = ids[: len(ids) - 1 : 2]
    probabilities = torch.rand(len(ids), generator=generator) + 0.01
    probabilities *= mass / torch.zeros(num_rows).index_add_(0, row_of_entry, probabilities)[row_of_entry]
    labels = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    labels[4] = ids[offsets[4]]
    weights = torch.rand(num_rows, generator=generator) + 0.5
    weights[3::5], labels[3::5] = 0, -100
    hidden = torch.randn(num_rows, WIDTH, generator=generator).to(dtype)
    weight = (spread * torch.randn(vocabulary, WIDTH, generator=generator)).to(dtype)
    base = BaseLogits(
        hidden_NB=torch.randn(num_rows, BASE_WIDTH, generator=generator).to(dtype),
        weight_VB=(spread * torch.randn(vocabulary, BASE_WIDTH, generator=generator)).to(dtype),
        bias_V=torch.randn(vocabulary, generator=generator),
        transform=transform,
    )
    targets = TargetBatch(
        offsets_N1=offsets,
        ids=ids,
        probabilities=probabilities,
        labels_N=labels,
        row_weights_N=weights,
        base_log_probabilities_N=-5 * torch.rand(num_rows, generator=generator),
    )
    return hidden, weight, targets, base


def base_logits(base):
    logits = base.hidden_NB.double() @ base.weight_VB.double().t() + base.bias_V.double()
    return logits if base.transform is None else base.transform(logits)


def dense_oracle(problem, alpha, part, mixture_lambda, renormalize, only_helpful, softcap=None):
    """Loss, gradients, kl, ce by autograd, all of it dense and in float64."""
    hidden, weight, targets, _ = problem
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    num_rows, vocabulary = len(hidden), len(weight)
    teacher = dense_targets(targets, num_rows, vocabulary)
    mass = teacher.sum(1)
    rows, labels = torch.arange(num_rows), targets.labels_N.clamp_min(0)
    is_taught = mass > 0
    if only_helpful:
        is_taught &= teacher[rows, labels] > targets.base_log_probabilities_N.double().exp()
    if renormalize:
        teacher = torch.where(mass[:, None] > 0, teacher / mass[:, None], teacher)
    z_base = base_logits(part.logits)
    teacher = (1 - part.joined_lambda) * z_base.softmax(1) + part.joined_lambda * teacher
    z = hidden @ weight.t()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(1)
    kl = (torch.xlogy(teacher, teacher) - teacher * log_p).sum(1) * (mass > 0)
    ce = -log_p[rows, labels]
    if mixture_lambda is not None:
        log_keep = math.log1p(-mixture_lambda)
        base = targets.base_log_probabilities_N.double()
        ce = -torch.logaddexp(base + log_keep, math.log(mixture_lambda) - ce)
    weights, alphas = targets.row_weights_N.double(), alpha * is_taught
    loss = (weights * (alphas * kl + (1 - alphas) * ce)).sum()
    loss.backward()
    return (
        loss.detach(),
        hidden.grad,
        weight.grad,
        (weights * kl).sum().detach(),
        (weights * ce).sum().detach(),
    )


def found_by(problem, alpha, part, **options):
    hidden, weight, targets, _ = problem
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, sums = sparse_loss(hidden, weight, targets, alpha=alpha, base=part, divisor=3.0, **options)
    (loss * 3 / 7).backward()
    assert hidden.grad.dtype == hidden.dtype
    return loss.detach() * 3, hidden.grad * 7, weight.grad * 7, sums.kl, sums.ce


def check(
    problem, part, *, tolerance, alpha=0.4, mixture_lambda=None, renormalize=True, only_helpful=False, **more
):
    options = {"mixture_lambda": mixture_lambda, "renormalize": renormalize, "only_helpful": only_helpful}
    expected = dense_oracle(problem, alpha, part, *options.values(), softcap=more.get("softcap"))
    found = found_by(problem, alpha, part, **options, **more)
    for number, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        error = float((value.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
        assert error <= tolerance, (number, error)


@pytest.mark.parametrize("joined_lambda", [0.05, 0.25, 1.0])
@pytest.mark.parametrize("mixture_lambda", [None, 0.3])
@pytest.mark.parametrize(("mass", "renormalize"), [(1.0, True), (0.6, True), (0.6, False)])
@pytest.mark.parametrize("chunk_bytes", [1, 8 * 37 * 5, 2**28])
def test_equals_dense_autograd(joined_lambda, mixture_lambda, mass, renormalize, chunk_bytes):
    problem = make_problem(mass=mass)
    part = BasePart(logits=problem[3], joined_lambda=joined_lambda)
    check(
        problem,
        part,
        tolerance=3e-6,
        mixture_lambda=mixture_lambda,
        renormalize=renormalize,
        chunk_bytes=chunk_bytes,
    )


@pytest.mark.parametrize("joined_lambda", [0.25, 1.0])
@pytest.mark.parametrize("chunk_bytes", [1, 2**28])
def test_a_soft_cap_of_the_memory_is_in_the_gradients(joined_lambda, chunk_bytes):
    problem = make_problem(num_rows=40, vocabulary=2100)
    part = BasePart(logits=problem[3], joined_lambda=joined_lambda)
    check(problem, part, tolerance=3e-6, softcap=4.0, mixture_lambda=0.3, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("only_helpful", [False, True])
def test_the_ends_of_alpha_and_rows_that_nobody_teaches(alpha, only_helpful):
    problem = make_problem(num_rows=40)
    part = BasePart(logits=problem[3], joined_lambda=0.5)
    check(problem, part, tolerance=3e-6, alpha=alpha, only_helpful=only_helpful)


def test_several_tiles_a_bias_and_a_soft_cap_of_the_base():
    problem = make_problem(num_rows=40, vocabulary=2100, transform=lambda z: 3 * torch.tanh(z / 3))
    part = BasePart(logits=problem[3], joined_lambda=0.25)
    check(problem, part, tolerance=3e-6, chunk_bytes=8 * 2100 * 16)


def test_a_logit_far_above_the_first_tile_takes_another_shift():
    hidden, weight, targets, base = make_problem(num_rows=40, vocabulary=2100)
    weight[1500] = 150 * hidden[4] / hidden[4].square().sum()
    base.weight_VB[1600] = 150 * base.hidden_NB[6] / base.hidden_NB[6].square().sum()
    part = BasePart(logits=base, joined_lambda=0.25)
    check((hidden, weight, targets, base), part, tolerance=3e-6)


def test_large_logits_stay_finite():
    problem = make_problem(spread=100)
    check(problem, BasePart(logits=problem[3], joined_lambda=0.25), tolerance=1e-5)


def test_tokens_that_the_base_rules_out():
    """The rows of a padded head have a bias of minus infinity in some families."""
    problem = make_problem()
    problem[3].bias_V[5] = -math.inf
    hidden, weight, targets, logits = problem
    part = BasePart(logits=logits, joined_lambda=0.25)
    loss, d_hidden, d_weight, *_ = found_by(problem, 0.4, part)
    logits.bias_V[5] = -1e4
    for value, wanted in zip((loss, d_hidden, d_weight), found_by(problem, 0.4, part), strict=False):
        assert value.isfinite().all() and torch.equal(value, wanted)


def test_a_memory_that_is_its_base_is_pulled_by_the_teacher_alone():
    """Then dloss/dz = α λ (p_base - t), at every token; what p_base and p_mem have in common cancels."""
    hidden, weight, targets, _ = make_problem()
    logits = BaseLogits(hidden_NB=hidden, weight_VB=weight)
    found = []
    for part in (BasePart(logits=logits, joined_lambda=0.25), None):
        leaf = weight.clone().requires_grad_()
        loss, _ = sparse_loss(hidden, leaf, targets, alpha=1.0, base=part)
        loss.backward()
        found.append(leaf.grad)
    is_taught = targets.offsets_N1.diff() > 0
    assert not is_taught.all()  # a row without a teacher is cross entropy, with a gradient of its own
    leaf = weight.clone().requires_grad_()
    untaught = (~is_taught).float() * targets.row_weights_N
    ce = torch.nn.functional.cross_entropy(hidden @ leaf.t(), targets.labels_N.clamp_min(0), reduction="none")
    (ce * untaught).sum().backward()
    torch.testing.assert_close(found[0] - leaf.grad, 0.25 * (found[1] - leaf.grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("joined_lambda", [0.25, 1.0])
def test_bfloat16_operands(joined_lambda):
    problem = make_problem(num_rows=256, vocabulary=1009, dtype=torch.bfloat16, spread=0.25)
    part = BasePart(logits=problem[3], joined_lambda=joined_lambda)
    check(problem, part, tolerance=6e-3, chunk_bytes=8 * 1009 * 64)


def test_only_the_sums_when_no_gradient_is_wanted():
    problem = make_problem()
    part = BasePart(logits=problem[3], joined_lambda=0.25)
    loss, sums = sparse_loss(*problem[:3], alpha=0.4, base=part)
    assert not loss.requires_grad
    wanted = found_by(problem, 0.4, part)
    torch.testing.assert_close((loss, sums.kl, sums.ce), (wanted[0], *wanted[3:]), rtol=1e-6, atol=0)
