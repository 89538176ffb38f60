"""λ of single requests: read, followed through a batch, taken once, mixed with a gate's."""

import math

import pytest
import torch

from mlpmem_ds.models.mixture import Constant, GateInputs, Weights
from mlpmem_ds.serving.request_weights import BatchWeights, RequestGate, StepWeights, requested_lmbda

NAN = math.nan


def test_a_request_names_a_weight_or_none() -> None:
    assert requested_lmbda(None) is None
    assert requested_lmbda({"other": 3}) is None
    assert requested_lmbda({"lmbda": 0}) == 0.0
    assert requested_lmbda({"lmbda": 0.3}) == 0.3


@pytest.mark.parametrize("value", [1.5, -0.1, "0.3", True, NAN])
def test_a_weight_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="a number in \\[0, 1\\]"):
        requested_lmbda({"lmbda": value})


def test_weights_follow_their_requests() -> None:
    batch = BatchWeights()
    assert batch.rows(3) is None
    batch.put(0, 0.1)
    batch.put(1, None)
    batch.put(2, 0.2)
    assert batch.rows(3) == pytest.approx([0.1, NAN, 0.2], nan_ok=True)
    batch.move(2, 1, swap=True)
    assert batch.rows(3) == pytest.approx([0.1, 0.2, NAN], nan_ok=True)
    batch.remove(0)
    batch.move(1, 0, swap=False)
    assert batch.rows(1) == [0.2]
    batch.put(0, None)
    assert batch.rows(1) is None


def test_weights_of_a_step_are_taken_once_and_by_as_many_rows() -> None:
    step = StepWeights()
    step.put(torch.tensor([0.1, 0.2]))
    assert step.take(2) is not None
    assert step.take(5) is None  # of a prompt
    step.put(torch.tensor([0.1, 0.2]))
    with pytest.raises(RuntimeError, match="2 requests and 3 rows"):
        step.take(3)
    assert step.take(3) is None


@pytest.mark.parametrize(
    ("gate", "num_memories", "expected"),
    [
        (Constant(0.4), 1, [0.4, 0.1, 0.0]),
        (Weights((0.4,)), 1, [0.4, 0.1, 0.0]),
        (Constant(0.4), 2, [[0.2, 0.2], [0.05, 0.05], [0.0, 0.0]]),
        (Weights((0.4, 0.2)), 2, [[0.4, 0.2], [0.05, 0.05], [0.0, 0.0]]),
    ],
)
def test_a_request_has_the_gates_weight_or_its_own(
    gate: Constant | Weights, num_memories: int, expected: list[float]
) -> None:
    own_R = torch.tensor([NAN, 0.1, 0.0], dtype=torch.float64)
    both = RequestGate(gate=gate, lmbdas_R=own_R, num_memories=num_memories)
    weights = both(GateInputs())
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    assert (both.reads, both.history, both.settings()) == (gate.reads, None, gate.settings())
    assert str(both) == f"{gate}, or the request's"


@pytest.mark.parametrize(("gate", "num_memories"), [(Weights((0.4,)), 1), (Weights((0.4, 0.2)), 2)], ids=str)
def test_fixed_weights_go_to_the_device_of_the_rows(gate: Weights, num_memories: int) -> None:
    """`meta` refuses to mix with the CPU as CUDA does."""
    own_R = torch.tensor([NAN, 0.1, 0.0], dtype=torch.float64, device="meta")
    weights = RequestGate(gate=gate, lmbdas_R=own_R, num_memories=num_memories)(GateInputs())
    assert (weights.device.type, weights.dtype) == ("meta", torch.float64)
    assert weights.shape == ((3,) if num_memories == 1 else (3, 2))


def test_a_gate_of_each_row_gives_way_where_a_request_names_a_weight() -> None:
    class Rows:
        reads, history = {}, None

        def __call__(self, _: object) -> torch.Tensor:
            return torch.tensor([0.3, 0.6])

    both = RequestGate(gate=Rows(), lmbdas_R=torch.tensor([NAN, 1.0]), num_memories=1)  # type: ignore[arg-type]
    assert both(GateInputs()).tolist() == pytest.approx([0.3, 1.0])
