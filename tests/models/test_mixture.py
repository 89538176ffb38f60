"""The mixture against float64 by its definition; gates; and that the formula stands at one place."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mlpmem_ds.maths.sparse_loss import TargetBatch, sparse_loss
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.memory_config import DEFAULT_LAMBDA
from mlpmem_ds.models.mixture import (
    Constant,
    Gate,
    GateInputs,
    Grid,
    StoredGate,
    Weights,
    checked_lmbda,
    log_mixture,
    log_mixture_of_bank,
    log_mixture_of_bank_logits,
    log_mixture_of_logits,
)

LIBRARY = Path(__file__).parents[2] / "mlpmem_ds"


def log_probabilities(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base, memory = torch.log_softmax(logits, -1).to(dtype)
    return base, memory


def by_definition(base: torch.Tensor, memory: torch.Tensor, lmbda: float | torch.Tensor) -> torch.Tensor:
    return torch.log((1 - lmbda) * base.double().exp() + lmbda * memory.double().exp())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 0.07), (torch.float16, 0.01)],
)
def test_the_mixture_is_that_of_its_definition(dtype: torch.dtype, tolerance: float) -> None:
    exact = log_probabilities(5, 50)
    base, memory = log_probabilities(5, 50, dtype=dtype)
    rows = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    for lmbda in (0.0, 0.01, 0.35, 0.99, 1, rows):
        mixture = log_mixture(base, memory, lmbda)
        assert mixture.dtype == torch.promote_types(dtype, torch.float32)
        weight = lmbda[:, None] if isinstance(lmbda, torch.Tensor) else lmbda
        # Half-precision inputs are rounded, the mixture of what they are is not.
        torch.testing.assert_close(
            mixture.double(), by_definition(base, memory, weight), rtol=0, atol=min(tolerance, 2e-6)
        )
        torch.testing.assert_close(mixture.double(), by_definition(*exact, weight), rtol=0, atol=tolerance)
    number = log_mixture(base, memory, 0.35)
    as_tensor = log_mixture(base, memory, torch.tensor(0.35, dtype=torch.float64))
    torch.testing.assert_close(as_tensor, number, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_the_two_alone_bit_for_bit_and_infinities_do_no_harm(dtype: torch.dtype) -> None:
    base = torch.tensor([-1.0, -math.inf, -3.0, -math.inf], dtype=dtype)
    memory = torch.tensor([-2.0, -5.0, -math.inf, -math.inf], dtype=dtype)
    for zero, one in (
        (0.0, 1.0),
        (0, 1),
        (torch.tensor(0.0), torch.tensor(1.0)),
        (torch.zeros(4), torch.ones(4)),
    ):
        assert torch.equal(log_mixture(base, memory, zero), base)
        assert torch.equal(log_mixture(base, memory, one), memory)
    expected = [
        math.log(0.75 * math.exp(-1) + 0.25 * math.exp(-2)),
        math.log(0.25) - 5,
        math.log(0.75) - 3,
        -math.inf,
    ]
    torch.testing.assert_close(log_mixture(base, memory, 0.25), torch.tensor(expected, dtype=dtype))
    damaged = torch.full_like(base, math.nan)
    assert torch.equal(log_mixture(base, damaged, 0.0), base)
    assert torch.equal(log_mixture(damaged, memory, 1.0), memory)


def test_a_weight_may_be_a_number_a_value_a_row_or_a_grid() -> None:
    base, memory = log_probabilities(2, 3, 7)
    rows = torch.tensor([[0.0, 0.3, 0.5], [0.9, 1.0, 0.1]])
    by_row = log_mixture(base, memory, rows)
    for first in range(2):
        for second in range(3):
            weight = float(rows[first, second])
            expected = log_mixture(base[first, second], memory[first, second], weight)
            torch.testing.assert_close(by_row[first, second], expected, rtol=1e-14, atol=0)
    assert torch.equal(log_mixture(base, memory, rows[..., None]), by_row)
    labels_base, labels_memory = base[..., 0].flatten(), memory[..., 0].flatten()
    curves = log_mixture(labels_base, labels_memory, Grid((0.0, 0.5, 1.0))())
    assert curves.shape == (3, 6)
    assert torch.equal(curves[0], labels_base) and torch.equal(curves[2], labels_memory)
    assert torch.equal(log_mixture(labels_base, labels_memory, torch.full((6,), 0.5)), curves[1])
    with pytest.raises(ValueError, match=r"λ is \[3\]; .* rows \[2, 3\]"):
        log_mixture(base, memory, torch.zeros(3))
    # A row as long as the vocabulary: still a value a row.
    square = log_probabilities(4, 4)
    weights = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    torch.testing.assert_close(log_mixture(*square, weights), by_definition(*square, weights[:, None]))


def test_the_mixture_stays_a_distribution_and_memories_are_mixed_one_after_the_other() -> None:
    base, memory = log_probabilities(6, 40)
    other = memory.flip(-1)
    both = log_mixture(log_mixture(base, memory, 0.4), other, 0.25)
    torch.testing.assert_close(both.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    expected = 0.75 * 0.6 * base.exp() + 0.75 * 0.4 * memory.exp() + 0.25 * other.exp()
    torch.testing.assert_close(both.exp(), expected)


def test_gradients_are_those_of_the_definition_and_finite_at_the_ends() -> None:
    base, memory = (tensor.requires_grad_() for tensor in log_probabilities(4, 9))
    lmbda = torch.tensor([0.1, 0.5, 0.999999, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_mixture, (base, memory, lmbda))
    found = torch.autograd.grad(log_mixture(base, memory, lmbda)[:, 3].sum(), (base, memory, lmbda))
    expected = torch.autograd.grad(
        by_definition(base, memory, lmbda[:, None])[:, 3].sum(), (base, memory, lmbda)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0.0, 1.0, 1e-30, 0.5], dtype=dtype, requires_grad=True)
        for gradient in torch.autograd.grad(log_mixture(base, memory, ends).sum(), (base, memory, ends)):
            assert bool(gradient.isfinite().all())
    # A gate that is sure of itself: the sigmoid is exactly 1 in float32.
    logits = torch.tensor([40.0, -200.0, 0.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(log_mixture(base, memory, logits.sigmoid())[:, 0].sum(), (logits,))
    assert bool(gradient.isfinite().all()) and float(gradient[3]) != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mixture_of_logits_is_that_of_their_probabilities(dtype: torch.dtype) -> None:
    base, memory = torch.randn(2, 2, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    base[0, 0, 4] = -math.inf
    by_row = torch.tensor([[0.0, 0.3, 0.5], [0.9, 1.0, 0.1]])
    for lmbda in (0, 0.25, 1.0, by_row):
        found = log_mixture_of_logits(base, memory, lmbda)
        weight = torch.as_tensor(lmbda, dtype=torch.float64).expand(2, 3)[..., None]
        expected = torch.log((1 - weight) * base.double().softmax(-1) + weight * memory.double().softmax(-1))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(log_mixture_of_logits(base, memory, 0.0), base.float().log_softmax(-1))


def test_logits_with_impossible_tokens() -> None:
    infinite = float("-inf")
    base, memory = torch.tensor([0.0, infinite, 0.0]), torch.tensor([infinite, infinite, 0.0])
    assert log_mixture_of_logits(base, memory, 0.5).exp().tolist() == pytest.approx([0.25, 0.0, 0.75])
    assert log_mixture_of_logits(base, memory, 0.0).exp().tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert log_mixture_of_logits(base, memory, 1.0).exp().tolist() == [0.0, 0.0, 1.0]


def test_mistaken_mixtures_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match=r"\[2, 5\], of the memory \[2, 6\]"):
        log_mixture_of_logits(torch.zeros(2, 5), torch.zeros(2, 6), 0.5)
    with pytest.raises(ValueError, match=r"λ is \[3\]; .* rows \[2\]"):
        log_mixture_of_logits(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(3))
    for lmbda in (-0.1, 1.1, math.nan, True, "0.3"):
        for function in (
            checked_lmbda,
            Constant,
            lambda value: log_mixture(torch.zeros(1), torch.zeros(1), value),
            lambda value: log_mixture_of_logits(torch.zeros(2, 5), torch.zeros(2, 5), value),
        ):
            with pytest.raises(ValueError, match=rf"\[0, 1\], not {lmbda!r}"):
                function(lmbda)
    outside = log_mixture(torch.zeros(3), torch.zeros(3), torch.tensor([-0.5, 1.5, 0.5]))
    assert outside.isnan().tolist() == [True, True, False]


def test_the_training_loss_through_the_mixture_is_its_derivative() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((6, 4), (11, 4))
    )
    labels, base = torch.randint(11, (6,), generator=generator), torch.rand(6, generator=generator).log()
    nothing = TargetBatch(
        offsets_N1=torch.zeros(7, dtype=torch.int64),
        ids=torch.zeros(0, dtype=torch.int64),
        probabilities=torch.zeros(0),
        labels_N=labels,
        base_log_probabilities_N=base,
    )
    for lmbda in (0.05, 0.25, 1.0):
        loss, _ = sparse_loss(hidden, weight, nothing, alpha=0.0, mixture_lambda=lmbda)
        memory = torch.log_softmax(hidden.double() @ weight.double().T, -1)[torch.arange(6), labels]
        expected = -log_mixture(base.double(), memory, lmbda).sum()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        for found, wanted in zip(
            torch.autograd.grad(loss, (hidden, weight)),
            torch.autograd.grad(expected, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_a_bank_mixes_as_its_definition_says(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(4, 5, 30, generator=generator, dtype=torch.float64)
    base, *memories = torch.log_softmax(logits, -1).to(dtype)
    rows = torch.rand(5, 4, generator=generator, dtype=torch.float64).softmax(-1)[:, 1:]
    for lmbdas in (torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64), rows):
        rest = 1 - lmbdas.sum(-1)
        parts = zip((rest, *lmbdas.unbind(-1)), (base, *memories), strict=True)
        wanted = torch.log(sum(weight[..., None] * part.double().exp() for weight, part in parts))
        mixed = log_mixture_of_bank(base, memories, lmbdas)
        assert mixed.dtype == dtype
        torch.testing.assert_close(mixed.double(), wanted, rtol=0, atol=tolerance)
        of_logits = log_mixture_of_bank_logits(logits[0], tuple(logits[1:]), lmbdas)
        torch.testing.assert_close(of_logits.double(), wanted, rtol=0, atol=2e-6)
        torch.testing.assert_close(  # of one column, a set of weights for each of its entries
            log_mixture_of_bank(base[:, 3], [memory[:, 3] for memory in memories], lmbdas), mixed[:, 3]
        )
    one = log_mixture_of_bank(base, memories[:1], rows[:, :1])
    torch.testing.assert_close(one, log_mixture(base, memories[0], rows[:, 0]))


def test_the_ends_of_a_bank_are_exact() -> None:
    base, first = log_probabilities(3, 8, dtype=torch.float32)
    second = torch.full_like(base, -math.inf)
    lmbdas = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.5]], requires_grad=True)
    mixed = log_mixture_of_bank(base, [first, second], lmbdas)
    assert torch.equal(mixed[0], base[0]) and torch.equal(mixed[1], first[1])
    torch.testing.assert_close(mixed[2], base[2] + math.log(0.5))
    mixed[:2].sum().backward()
    assert lmbdas.grad is not None and bool(lmbdas.grad.isfinite().all())
    rounded = torch.tensor([0.1, 0.9 + 3e-8])  # float32 sums of a softmax
    assert torch.isfinite(log_mixture_of_bank(base, [first, first], rounded)).all()
    assert torch.isnan(log_mixture_of_bank(base, [first, first], torch.tensor([0.5, 0.6]))).all()
    with pytest.raises(ValueError, match="2 memories need as many weights"):
        log_mixture_of_bank(base, [first, second], torch.tensor([0.3]))


def test_the_weights_of_a_bank_are_a_gate() -> None:
    gate = Weights((0.25, 0.5))
    assert isinstance(gate, StoredGate) and gate.history is None and str(gate) == "λ = 0.25, 0.5"
    assert gate().tolist() == [0.25, 0.5]
    for wrong in ((), (0.5, 0.6), (-0.1, 0.2)):
        with pytest.raises(ValueError, match=r"λ|weights"):
            Weights(wrong)


class Confidence(nn.Module):
    """A learned gate as a later one may be: from both entropies and a state of the base."""

    reads = {"final": CapturePoint(layer=-1, point="final_norm")}
    history = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2 + 3, 1)

    def forward(self, inputs: GateInputs, /) -> torch.Tensor:
        entropies = [
            -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
            for logits in (inputs.base_logits, *inputs.memory_logits)
            if logits is not None
        ]
        features = torch.cat([torch.stack(entropies, -1), inputs.states["final"]], -1)
        weight: torch.Tensor = self.layer(features).sigmoid()[..., 0]
        return weight


def test_constants_grids_and_learned_gates_are_used_alike() -> None:
    base, memory = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(2))
    inputs = GateInputs(base_logits=base, memory_logits=(memory,), states={"final": torch.ones(4, 3)})
    gates: list[Gate] = [Constant(0.3), Confidence()]
    for gate in gates:
        assert isinstance(gate, Gate)
        mixture = log_mixture_of_logits(base, memory, gate(inputs))
        torch.testing.assert_close(mixture.exp().sum(-1), torch.ones(4))
    assert Constant(0.3)() == 0.3 and not Constant().reads and Constant().lmbda == DEFAULT_LAMBDA
    assert isinstance(Grid((0.5,)), Gate) and not isinstance(Grid((0.5,)), StoredGate)
    gate = gates[1]
    assert isinstance(gate, nn.Module)
    (-log_mixture_of_logits(base, memory, gate(inputs))[:, 1].sum()).backward()
    assert bool(gate.layer.weight.grad.any())  # type: ignore[union-attr]


def test_a_grid_is_parsed_from_numbers_and_ranges() -> None:
    grid = Grid.parse(["0:1:0.05"]).lambdas
    assert len(grid) == 21 and grid[0] == 0 and grid[-1] == 1 and grid[7] == 0.35
    assert Grid.parse(["0", ".5", "0.5", "0.2:0.4:0.1"]).lambdas == (0.0, 0.5, 0.2, 0.3, 0.4)
    assert [gate.lmbda for gate in Grid.parse(["0.1", "1"])] == [0.1, 1.0]
    assert len(Grid.parse(["0:1:0.001"]).lambdas) == 1001
    for word, message in (
        ("0:1", "first:last:step"),
        ("0:1:0", "first:last:step"),
        ("0:1:nan", "first:last:step"),
        ("much", "first:last:step"),
        ("0:1.2:0.1", "between 0 and 1"),
        ("-0.1:1:0.1", "between 0 and 1"),
        ("1.5", "between 0 and 1"),
        ("nan", "between 0 and 1"),
        ("0.5:0.4:0.1", "between 0 and 1"),
        ("0:1:0.0009", "0:1:0.0009 has more than 1,000 steps"),
        ("0:1:1e-320", "more than 1,000 steps"),  # 1 / step is infinite
    ):
        with pytest.raises(ValueError, match=message):
            Grid.parse([word])
    with pytest.raises(ValueError, match="at least one"):
        Grid(())
    with pytest.raises(ValueError, match="0.5 and 0.50000001 are alike in six digits: give one"):
        Grid.parse(["0:1:0.1", "0.50000001"])


# The mixture, its Triton twins, and the loss through it, which the test above ties to the mixture. The
# benchmarks' comparators are written plainly, without the library.
FORMULA = (
    "models/mixture.py",
    "maths/sparse_chunk.py",
    "maths/based_chunk.py",
    "maths/sparse_targets.py",
    "maths/kernels/",
    "benchmarks/",
)


def formulas(source: str) -> list[str]:
    """Names in a file that compute a mixture of two distributions, or a logarithm of its weights."""
    return [
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in ("logaddexp", "logaddexp2", "log1p")
    ]


def test_the_formula_stands_at_one_place() -> None:
    assert formulas((LIBRARY / "models/mixture.py").read_text())
    assert formulas("import numpy as np\nnp.logaddexp(a, b)") == ["logaddexp"]
    elsewhere = {
        path.relative_to(LIBRARY).as_posix(): found
        for path in sorted(LIBRARY.rglob("*.py"))
        if not path.relative_to(LIBRARY).as_posix().startswith(FORMULA)
        and (found := formulas(path.read_text()))
    }
    assert elsewhere == {}
