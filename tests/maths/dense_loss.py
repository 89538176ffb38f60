"""The sparse loss's oracle: problems with all that may go wrong, and dense float64 autograd on them."""

import math

import torch

from mlpmem_ds.maths.sparse_loss import TargetBatch, sparse_loss


def make_problem(
    num_rows=13,
    width=16,
    vocabulary=37,
    dtype=torch.float32,
    seed=0,
    max_entries=9,
    mass=1.0,
    duplicates=True,
):
    """Rows with repeated and unordered ids, an empty row, rows ignored with an impossible label."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, max_entries + 1, (num_rows,), generator=generator)
    if num_rows > 2:
        counts[1] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    row_of_entry = torch.repeat_interleave(counts)
    if duplicates:
        ids = torch.randint(0, vocabulary, (len(row_of_entry),), generator=generator)
        ids[1::2] = ids[: len(ids) - 1 : 2]
    else:
        ids = torch.cat(
            [torch.randperm(vocabulary, generator=generator)[:n].sort().values for n in counts.tolist()]
        )
    probabilities = torch.rand(len(ids), generator=generator) + 0.01
    sums = torch.zeros(num_rows).index_add_(0, row_of_entry, probabilities)
    probabilities = probabilities / sums[row_of_entry] * mass
    weights = torch.rand(num_rows, generator=generator) + 0.5
    weights[3::5] = 0
    labels = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    base = -5 * torch.rand(num_rows, generator=generator)
    labels[weights == 0], base[weights == 0] = -100, math.nan
    base[0] = -math.inf
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    targets = TargetBatch(
        offsets_N1=offsets,
        ids=ids,
        probabilities=probabilities,
        labels_N=labels,
        row_weights_N=weights,
        base_log_probabilities_N=base,
    )
    return hidden, weight, targets


def dense_targets(targets, num_rows, vocabulary):
    """float64 [rows, vocabulary], entry by entry."""
    dense = torch.zeros(num_rows, vocabulary, dtype=torch.float64)
    for row in range(num_rows):
        for entry in range(targets.offsets_N1[row], targets.offsets_N1[row + 1]):
            dense[row, targets.ids[entry]] += targets.probabilities[entry].double()
    return dense


def dense_oracle(hidden, weight, targets, alpha, mixture_lambda, renormalize, only_helpful=False):
    """Loss, gradients, kl and ce in float64, from a dense target and all logits."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    num_rows, vocabulary = len(hidden), len(weight)
    teacher = dense_targets(targets, num_rows, vocabulary)
    mass = teacher.sum(1)
    is_taught = mass > 0
    if only_helpful:
        of_label = teacher[torch.arange(num_rows), targets.labels_N.clamp_min(0)]
        is_taught &= of_label > targets.base_log_probabilities_N.double().exp()
    if renormalize:
        teacher = torch.where(mass[:, None] > 0, teacher / mass[:, None], teacher)
    log_probabilities = torch.log_softmax(hidden @ weight.t(), 1)
    kl = (torch.xlogy(teacher, teacher) - teacher * log_probabilities).sum(1)
    weights = torch.ones(num_rows) if targets.row_weights_N is None else targets.row_weights_N
    counted = weights != 0
    log_label = log_probabilities[torch.arange(num_rows), targets.labels_N.where(counted, 0)]
    if mixture_lambda is None:
        ce = -log_label
    else:
        base = targets.base_log_probabilities_N.double().where(counted, 0)
        log_keep = torch.tensor(1 - mixture_lambda, dtype=torch.float64).log()
        ce = -torch.logaddexp(
            base + log_keep, log_label + math.log(mixture_lambda)
        )  # float64 exp underflows at -745
    alphas = alpha * is_taught
    loss = (weights.double() * (alphas * kl + (1 - alphas) * ce)).sum()
    loss.backward()
    parts = (
        loss.detach(),
        hidden.grad,
        weight.grad,
        (weights * kl).sum().detach(),
        (weights * ce).sum().detach(),
    )
    # The same with every difference turned into a sum: what rounding errors are in proportion to, where the
    # parts nearly cancel.
    with torch.no_grad():
        terms = weights[:, None] * (log_probabilities.exp() + teacher)
        terms[torch.arange(num_rows), targets.labels_N.where(counted, 0)] += weights
        entropy = (
            weights[:, None] * (torch.xlogy(teacher, teacher).abs() + teacher * log_probabilities.abs())
        ).sum()
        uncancelled = (
            entropy + parts[4].abs(),
            terms @ weight.abs(),
            terms.t() @ hidden.abs(),
            entropy,
            parts[4],
        )
    return parts, uncancelled


def relative_error(found, expected, scale):
    return float((found.double() - expected).norm() / scale.norm().clamp_min(1e-30))


def check(
    problem,
    *,
    tolerance,
    alpha=0.4,
    mixture_lambda=None,
    renormalize=True,
    only_helpful=False,
    may_cancel=False,
    **options,
):
    hidden, weight, targets = problem
    expected, uncancelled = dense_oracle(
        hidden, weight, targets, alpha, mixture_lambda, renormalize, only_helpful
    )
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, sums = sparse_loss(
        hidden,
        weight,
        targets,
        alpha=alpha,
        mixture_lambda=mixture_lambda,
        renormalize=renormalize,
        only_helpful=only_helpful,
        **options,
    )
    (loss / 7).backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == hidden.dtype
    found = (loss.detach(), hidden.grad * 7, weight.grad * 7, sums.kl, sums.ce)
    for part, (value, wanted, scale) in enumerate(zip(found, expected, uncancelled, strict=True)):
        assert relative_error(value, wanted, scale if may_cancel else wanted) <= tolerance, part
    assert not sums.kl.requires_grad and not sums.ce.requires_grad
    return loss.detach(), hidden.grad, weight.grad
