"""The Triton twins against the torch originals and float64: on a GPU, or in Triton's interpreter (see
test_interpreter.py)."""

import math
import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device, or Triton's interpreter"
    ),
]
pytest.importorskip("triton", reason="Triton is not installed")

from mlpmem_ds.maths import kernels, products  # noqa: E402
from mlpmem_ds.maths.head_scores import token_log_probabilities  # noqa: E402
from mlpmem_ds.maths.listed_keys import in_list_order  # noqa: E402
from mlpmem_ds.maths.lists_on_device import list_neighbours_on_device  # noqa: E402
from mlpmem_ds.maths.neighbours import Exclusion  # noqa: E402
from mlpmem_ds.maths.sparse_loss import TargetBatch, sparse_loss  # noqa: E402
from mlpmem_ds.models.mixture import log_mixture, log_mixture_of_logits  # noqa: E402
from mlpmem_ds.models.mixture_on_device import mixture_on_device  # noqa: E402


@pytest.fixture
def twins(monkeypatch):
    """Turn the twins on (the interpreter's tensors are on CPU) or off."""

    def choose(on):
        monkeypatch.setattr(kernels, "usable", lambda tensor: on)
        monkeypatch.setattr(products, "_TILE_COLUMNS", 10**6 if on else 1024)  # a GPU has one tile

    return choose


def make_problem(num_rows, vocabulary, dtype, mass=1.0, seed=0):
    """Repeated and unordered ids, more than a block of entries, an empty row, ignored rows, labels in and out
    of the entries."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 9, (num_rows,), generator=generator)
    counts[1], counts[2] = 0, 150
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    row_of_entry = torch.repeat_interleave(counts)
    ids = torch.randint(0, vocabulary, (len(row_of_entry),), generator=generator)
    ids[1::3] = ids[: len(ids) - 1 : 3]
    probabilities = torch.rand(len(ids), generator=generator)
    probabilities[5] = 0.0
    probabilities /= torch.zeros(num_rows).index_add_(0, row_of_entry, probabilities)[row_of_entry] / mass
    labels = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    labels[2] = ids[offsets[2]]
    weights = torch.rand(num_rows, generator=generator) + 0.5
    weights[3::5] = 0
    base = -5 * torch.rand(num_rows, generator=generator)
    labels[weights == 0], base[weights == 0], base[0] = -100, math.nan, -math.inf
    hidden = torch.randn(num_rows, 16, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, 16, generator=generator).to(dtype)
    targets = TargetBatch(
        offsets_N1=offsets,
        ids=ids,
        probabilities=probabilities,
        labels_N=labels,
        row_weights_N=weights,
        base_log_probabilities_N=base,
    )
    return hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)


def results(problem, **options):
    hidden, weight, targets = problem
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, sums = sparse_loss(hidden, weight, targets, **options)
    loss.backward()
    return loss.detach(), sums.kl, sums.ce, hidden.grad.float(), weight.grad.float()


@pytest.mark.parametrize("vocabulary", [37, 1024, 8192 + 5])
@pytest.mark.parametrize("mixture_lambda", [None, 0.25, 1.0])
@pytest.mark.parametrize(("mass", "renormalize"), [(1.0, True), (0.6, False)])
def test_the_loss_and_its_gradients_are_the_originals(twins, vocabulary, mixture_lambda, mass, renormalize):
    problem = make_problem(11, vocabulary, torch.float32, mass=mass)
    options = {"alpha": 0.4, "mixture_lambda": mixture_lambda, "renormalize": renormalize}
    twins(False)
    expected = results(problem, **options)
    twins(True)
    found = results(problem, chunk_bytes=8 * vocabulary * 4, **options)
    for part, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert (value - wanted).norm() <= 2e-6 * wanted.norm(), part


def test_rows_that_nobody_teaches_are_the_originals(twins):
    hidden, weight, targets = make_problem(40, 300, torch.float32)
    for row in range(2, 40, 2):  # the teacher knows these labels
        if targets.row_weights_N[row]:
            targets.labels_N[row] = targets.ids[targets.offsets_N1[row]]
    found = []
    for on in (False, True):
        twins(on)
        options = {"alpha": 0.4, "mixture_lambda": 0.25, "only_helpful": True}
        found.append(results((hidden, weight, targets), **options))
        _, sums = sparse_loss(hidden, weight, targets, **options)
        assert 0 < sums.taught < sums.weight
    for part, (value, wanted) in enumerate(zip(*found, strict=True)):
        assert (value - wanted).norm() <= 2e-6 * wanted.norm(), part


def test_the_soft_cap_is_that_of_the_originals(twins):
    problem = make_problem(11, 1024, torch.float32)
    options = {"alpha": 0.4, "scale": 0.5, "softcap": 2.0, "bias_V": torch.linspace(-1, 1, 1024).to(DEVICE)}
    twins(False)
    expected = results(problem, **options)
    twins(True)
    found = results(problem, chunk_bytes=8 * 1024 * 4, **options)
    for part, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert (value - wanted).norm() <= 2e-6 * wanted.norm(), part


def five_rows():
    """Logits, the ids that a teacher gives equal mass, and what else `sparse_rows` takes."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 1000, generator=generator)
    entries = torch.randint(0, 1000, (5, 4), generator=generator)
    entries = (entries + torch.arange(4) * 1000 // 4) % 1000
    arguments = {
        "offsets_C1": 4 * torch.arange(6),
        "ids_E": entries.reshape(-1),
        "teacher_E": torch.full((20,), 0.25),
        "teacher_mass_C": torch.ones(5),
        "alphas_C": torch.full((5,), 0.5),
        "labels_C": entries[:, 0].contiguous(),
        "weights_C": torch.ones(5),
    }
    return logits, entries, {name: value.to(DEVICE) for name, value in arguments.items()}


def test_bfloat16_gradients_of_the_logits_are_rounded_once():
    from mlpmem_ds.maths.kernels.sparse_rows import sparse_rows

    logits, entries, arguments = five_rows()
    exact, rounded = (
        sparse_rows(logits.to(DEVICE), log_base_C=None, log_lambda=0.0, gradient_dtype=dtype, **arguments)[2]
        for dtype in (torch.float32, torch.bfloat16)
    )
    step = (
        2.0**-8 if DEVICE == "cuda" else 2.0**-7
    )  # the interpreter truncates where a GPU rounds to the nearest
    assert ((rounded.float() - exact).abs() <= step * exact.abs()).all()
    wanted = torch.softmax(logits.double(), 1).scatter_add_(
        1, entries, torch.full((5, 4), -0.125, dtype=torch.double)
    )
    wanted[torch.arange(5), entries[:, 0]] -= 0.5
    assert (exact.cpu() - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_memory_that_is_not_a_number_gives_no_cross_entropy_through_the_mixture():
    from mlpmem_ds.maths.kernels.sparse_rows import sparse_rows

    logits, _, arguments = five_rows()
    logits[1, 7] = logits[3] = math.nan
    log_base, log_lambda = torch.tensor([-0.5, -2.0, -math.inf, -1.0, -30.0]), math.log(0.25)
    _, ce, _ = sparse_rows(
        logits.to(DEVICE),
        log_base_C=log_base.to(DEVICE),
        log_lambda=log_lambda,
        gradient_dtype=None,
        **arguments,
    )
    log_memory = torch.log_softmax(logits, 1).gather(1, arguments["labels_C"].cpu()[:, None])[:, 0]
    wanted = -torch.logaddexp(log_base, log_memory + log_lambda)
    assert wanted.isnan().tolist() == [False, True, False, True, False]
    torch.testing.assert_close(ce.cpu(), wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_only_the_sums_when_no_gradient_is_wanted(twins):
    hidden, weight, targets = make_problem(11, 100, torch.float32)
    twins(False)
    expected, _ = sparse_loss(hidden, weight, targets, alpha=0.4)
    twins(True)
    found, _ = sparse_loss(hidden, weight, targets, alpha=0.4)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocabulary", [37, 8192 + 5])
def test_label_log_probabilities_are_the_originals(twins, vocabulary):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(vocabulary, 16, generator=generator)
    labels = torch.randint(0, vocabulary, (9,), generator=generator)
    bias = torch.randn(vocabulary, generator=generator)
    bias[5:30] = -math.inf
    labels[:4] = torch.tensor([0, 31, vocabulary - 1, 7])
    twins(True)
    tokens = torch.stack([labels, labels.flip(0)], dim=1)
    found = token_log_probabilities(
        hidden.to(DEVICE), weight.to(DEVICE), tokens.to(DEVICE), bias=bias.to(DEVICE)
    )
    exact = torch.log_softmax(hidden.double() @ weight.double().t() + bias, 1).gather(1, tokens)
    torch.testing.assert_close(found.cpu().double(), exact, rtol=0, atol=1e-5)
    assert found[3, 0] == found[5, 1] == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [50, 2048, 9001])
def test_the_mixture_is_the_originals(twins, dtype, vocabulary):
    generator = torch.Generator().manual_seed(0)
    base, memory = (3 * torch.randn(2, 2, 3, vocabulary, generator=generator)).to(dtype)
    base[0, 0, :40], memory[1, 2, 5] = -math.inf, -math.inf
    base[0, 1, 7], memory[0, 1, 7] = -math.inf, -math.inf
    logs = [torch.log_softmax(logits.double(), -1) for logits in (base, memory)]
    twins(True)
    by_row = torch.tensor([[0.0, 0.3, 0.5], [0.9, 1.0, 0.1]], dtype=torch.float64)
    for lmbda in (0, 0.25, 1.0, by_row):
        weight = lmbda.to(DEVICE) if isinstance(lmbda, torch.Tensor) else lmbda
        found = mixture_on_device(base.to(DEVICE), memory.to(DEVICE), weight).cpu()
        wanted = log_mixture(*logs, lmbda)
        assert found.dtype == torch.float32 and found.shape == base.shape
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.double().exp().sum(-1), torch.ones(2, 3).double(), rtol=0, atol=2e-6)


def test_the_mixture_ends_are_exactly_the_two_alone(twins):
    generator = torch.Generator().manual_seed(0)
    base, memory = torch.randn(2, 3, 4100, generator=generator).to(DEVICE)
    twins(True)
    assert torch.equal(mixture_on_device(base, memory, 0), mixture_on_device(base, base, 0.0))
    assert torch.equal(mixture_on_device(base, memory, 1), mixture_on_device(memory, memory, 1.0))
    alone = torch.log_softmax(base, -1)
    torch.testing.assert_close(mixture_on_device(base, memory, 0), alone, rtol=0, atol=2e-6)


def test_a_side_that_is_not_a_number_makes_its_rows_of_the_mixture_so(twins):
    """Not the other side, less what its share takes; and the ends do not read the side that has no share."""
    generator = torch.Generator().manual_seed(0)
    base, memory = torch.randn(2, 3, 4100, generator=generator).to(DEVICE)
    whole = memory.clone()
    memory[1, 4000] = math.nan
    by_row = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64, device=DEVICE)
    twins(True)
    for lmbda in (0.25, by_row):
        for sides in ((base, memory), (memory, base)):
            found = mixture_on_device(*sides, lmbda)
            wanted = log_mixture_of_logits(*sides, lmbda)
            assert found.isnan().all(1).tolist() == found.isnan().any(1).tolist() == [False, True, False]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, equal_nan=True)
    assert torch.equal(mixture_on_device(base, memory, 0), mixture_on_device(base, whole, 0))
    assert torch.equal(mixture_on_device(memory, base, 1.0), mixture_on_device(whole, base, 1.0))


@pytest.mark.parametrize("dim", [6, 200])
def test_candidates_of_lists_are_the_originals(twins, dim):
    """Bit for bit: ties, tiles of 1 to 128 pairs, short and long lists, runs, windows and documents."""
    generator = np.random.default_rng(0)
    keys = generator.integers(-4 if dim == 6 else -128, 5 if dim == 6 else 128, (900, dim)).astype(np.int8)
    keys[:20] = -128
    lists = generator.choice(9, 900, p=np.array([30, 20, 15, 12, 10, 6, 4, 2, 1]) / 100)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(lists, minlength=10))])
    listed = in_list_order(keys, offsets, np.argsort(lists, kind="stable"))
    ids = np.arange(0, 900, 3)
    probes = np.stack([generator.permutation(10)[:4] for _ in ids])
    probes[probes == 7] = generator.choice([-1, 7], (probes == 7).sum(), p=[0.99, 0.01])  # probed by few
    first = ids // 200 * 200
    for exclusion in (
        None,
        Exclusion(query_ids_Q=ids, window=2),
        Exclusion(query_ids_Q=ids, first_hidden_Q=first, stop_hidden_Q=first + 200),
    ):
        found = []
        for on in (False, True):
            twins(on)
            for budget in (10**6, 2**28):
                found.append(
                    list_neighbours_on_device(
                        keys[ids],
                        probes,
                        listed,
                        60,
                        exclusion=exclusion,
                        device=torch.device(DEVICE),
                        budget=budget,
                    ).packed_QK
                )
        assert all(np.array_equal(part, found[0]) for part in found)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_bfloat16_operands_on_a_gpu_are_within_the_bound(twins):
    problem = make_problem(256, 50257, torch.bfloat16)
    hidden, weight, targets = problem
    twins(False)
    expected = results((hidden.float(), weight.float(), targets), alpha=0.4)
    twins(True)
    for found in (results(problem, alpha=0.4), results(problem, alpha=0.4, chunk_bytes=6 * 50257 * 100)):
        for value, wanted in zip(found, expected, strict=True):
            assert (value - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_gpu_holds_no_more_than_the_budget(twins):
    generator = torch.Generator().manual_seed(0)
    num_rows, width, vocabulary, budget = 4096, 256, 50257, 128 * 2**20
    hidden = torch.randn(num_rows, width, generator=generator).bfloat16().to(DEVICE).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).bfloat16().to(DEVICE).requires_grad_()
    targets = TargetBatch(
        offsets_N1=torch.arange(num_rows + 1),
        ids=torch.randint(vocabulary, (num_rows,), generator=generator),
        probabilities=torch.ones(num_rows),
        labels_N=torch.randint(vocabulary, (num_rows,), generator=generator),
    ).to(DEVICE)
    twins(True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sparse_loss(hidden, weight, targets, alpha=0.5, chunk_bytes=budget)
    gradients = 4 * weight.numel() + 2 * hidden.numel()
    assert torch.cuda.max_memory_allocated() - before - gradients <= 1.1 * budget
