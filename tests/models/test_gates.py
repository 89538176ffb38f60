"""Gates that learned λ, and the joint model and its gate: λ for all positions or for each, and who mixes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mlpmem_ds.models import gates
from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.gate_features import History, confidences
from mlpmem_ds.models.gates import (
    GATES,
    ConfidencesGate,
    HistoryGate,
    LearnedGate,
    RouterGate,
    load_gate,
    open_gate,
)
from mlpmem_ds.models.joint_parts import MEMORY_INPUT
from mlpmem_ds.models.mixture import (
    Constant,
    GateInputs,
    StoredGate,
    Weights,
    log_mixture,
    log_mixture_of_bank,
    log_mixture_of_logits,
)
from mlpmem_ds.models.mixture_on_device import mixture_on_device

from ..joint_models import joined
from .conftest import POINT, WIDTH, expected_log_probabilities, random_ids, tiny_base, tiny_joint, tiny_memory


def test_lmbda_is_settable_and_exact_at_its_ends() -> None:
    joint, ids_BS = tiny_joint("gpt2"), random_ids()
    joint.lmbda = 0
    assert torch.equal(joint(ids_BS).logits, joint.base(ids_BS).logits)
    for lmbda in (1.0, 0.9):
        joint.lmbda = lmbda
        torch.testing.assert_close(
            joint(ids_BS).logits.double().log_softmax(-1),
            expected_log_probabilities(joint, ids_BS, POINT),
            rtol=1e-5,
            atol=1e-5,
        )
    for wrong in (-0.01, 1.01, float("nan"), True, "0.3"):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            joint.lmbda = wrong  # type: ignore[assignment]
    assert joint.lmbda == 0.9


def test_another_function_may_mix() -> None:
    joint, ids_BS = tiny_joint("llama"), random_ids()
    plain = joint(ids_BS).logits
    calls: list[float] = []

    def mixture(base: torch.Tensor, memory: torch.Tensor, lmbda: float) -> torch.Tensor:
        calls.append(lmbda)
        return mixture_on_device(base, memory, lmbda)

    joint.mixture = mixture
    torch.testing.assert_close(joint(ids_BS).logits, plain, rtol=0, atol=1e-6)
    joint.lmbda = 0.0
    assert torch.equal(joint(ids_BS).logits, joint.base(ids_BS).logits) and calls == [0.4]


class OwnGate(nn.Module):
    """λ from the base's entropy and two of its states, one of them the memory's own input."""

    reads = {"middle": CapturePoint(layer=1, point="layer_output")}
    history = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * width + 1, 1)

    def forward(self, inputs: GateInputs, /) -> torch.Tensor:
        assert inputs.base_logits is not None
        assert inputs.base_logits.shape == inputs.memory_logits[0].shape
        log_base = inputs.base_logits.log_softmax(-1)
        entropy = -(log_base.exp() * log_base).sum(-1, keepdim=True)
        features = torch.cat([entropy, inputs.states["middle"], inputs.states[MEMORY_INPUT]], dim=-1)
        weight: torch.Tensor = self.layer(features).sigmoid()[..., 0]
        return weight

    def settings(self) -> dict[str, object]:
        return {"kind": "learned", "width": WIDTH}


@torch.no_grad()
def test_a_learned_gate_is_one_more_member(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(lmbda: float, settings: Mapping[str, Any]) -> OwnGate:
        assert lmbda == 0.4
        return OwnGate(settings["width"])

    monkeypatch.setattr(gates, "GATES", {**gates.GATES, "learned": build})
    base, ids_BS = tiny_base("llama"), random_ids()
    joint = joined(base, tiny_memory(), lmbda=0.4, input_point=POINT)
    torch.manual_seed(1)
    gate = OwnGate(WIDTH)
    joint.set_gate(gate)
    states = capture(base, [POINT, gate.reads["middle"]])(ids_BS).states
    base_logits, memory_logits = base(ids_BS).logits, joint.memory.head(joint.memory(states[POINT]))
    inputs = GateInputs(
        base_logits=base_logits,
        memory_logits=(memory_logits,),
        states={"middle": states[gate.reads["middle"]], MEMORY_INPUT: states[POINT]},
    )
    lmbda_BS = gate(inputs)
    assert lmbda_BS.shape == ids_BS.shape and float(lmbda_BS.std()) > 0.01
    expected_BSV = log_mixture_of_logits(base_logits, memory_logits, lmbda_BS)
    torch.testing.assert_close(joint(ids_BS).logits.log_softmax(-1), expected_BSV, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(joint, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids_BS).logits.log_softmax(-1), expected_BSV, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    last_BV = joint(ids_BS, logits_to_keep=1).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(last_BV, expected_BSV[:, -1], rtol=1e-5, atol=1e-5)
    generated = joint.generate(ids_BS, max_new_tokens=4, do_sample=False, eos_token_id=None)

    joint.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["gate"] == {"kind": "learned", "width": WIDTH}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids_BS).logits, joint(ids_BS).logits)
    again = loaded.generate(ids_BS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(again, generated)

    joint.lmbda = 0.7
    assert joint.gate == Constant(0.7) and joint.config.gate == {"kind": "constant"}
    assert not any(name.startswith("gate") for name in joint.state_dict())
    expected_BSV = expected_log_probabilities(joint, ids_BS, POINT)
    found_BSV = joint(ids_BS).logits.double().log_softmax(-1)
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=1e-5, atol=1e-5)


# Learned gates: inputs of a base with V = 11 tokens and of M memories
def some_inputs(num_memories: int, *shape: int) -> GateInputs:
    generator = torch.Generator().manual_seed(3)
    base, *memories = 3 * torch.randn(1 + num_memories, *shape, 11, generator=generator)
    return GateInputs(
        base_logits=base,
        memory_logits=tuple(memories),
        memory_states=tuple(torch.randn(*shape, 6, generator=generator) for _ in memories),
        states={"final": torch.randn(*shape, 5, generator=generator)},
        history=torch.randn(*shape, 3 * num_memories + 1, generator=generator),
    )


def learned(kind: str, lmbdas: tuple[float, ...]) -> LearnedGate:
    if kind == "router":
        return RouterGate(lmbdas=lmbdas, base_size=5, memory_sizes=[6] * len(lmbdas))
    return (HistoryGate if kind == "history" else ConfidencesGate)(lmbdas=lmbdas)


LEARNED = ("history", "confidences", "router")


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("lmbdas", [(0.35,), (0.2, 0.55, 0.1)])
def test_an_untrained_gate_is_the_best_fixed_weights(kind: str, lmbdas: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    gate = learned(kind, lmbdas)
    inputs = some_inputs(len(lmbdas), 2, 4)
    gate.standardize(torch.ones(len(gate.mean)), torch.arange(float(len(gate.mean))))
    weights = gate(inputs)
    fixed = torch.tensor(lmbdas).expand(2, 4, len(lmbdas))
    torch.testing.assert_close(weights, fixed[..., 0] if len(lmbdas) == 1 else fixed)
    assert isinstance(gate, StoredGate) and str(gate) == f"gate: {kind}"
    assert (gate.history is not None) == (kind == "history")
    assert sum(parameter.numel() for parameter in gate.parameters()) < 120_000

    assert inputs.base_logits is not None
    base, *memories = (logits.log_softmax(-1) for logits in (inputs.base_logits, *inputs.memory_logits))
    mixed = (
        log_mixture(base, memories[0], weights)
        if len(lmbdas) == 1
        else log_mixture_of_bank(base, memories, weights)
    )
    torch.testing.assert_close(mixed, log_mixture_of_bank(base, memories, torch.tensor(lmbdas)))
    (-mixed[..., 2].sum()).backward()
    assert bool(gate.out.weight.grad.any())  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", LEARNED)
def test_a_learned_gate_is_a_net_of_two_layers(kind: str) -> None:
    torch.manual_seed(1)
    gate = learned(kind, (0.3, 0.3)).double()
    nn.init.normal_(gate.out.weight)
    mean, deviation = torch.randn(2, len(gate.mean), dtype=torch.float64).abs()
    gate.standardize(mean, deviation.index_fill(0, torch.tensor([1]), 0.0))
    inputs = some_inputs(2, 7)
    features = gate.features(inputs).double()
    scaled = (features - mean) / deviation
    scaled[:, 1] = 0  # a feature that does not vary says nothing
    if isinstance(gate, RouterGate):
        encoded = [
            torch.relu(scaled[:, 17 + c, None] * layer.weight[:, 0] + layer.bias)  # type: ignore[operator]
            for c, layer in enumerate(gate.scalars)
        ]
        scaled = torch.cat([scaled[:, :17], *encoded], -1)
    hidden = torch.nn.functional.gelu(scaled @ gate.layer.weight.t() + gate.layer.bias)
    scores = hidden @ gate.out.weight.t() + gate.out.bias
    wanted = torch.cat([torch.zeros(7, 1), scores], -1).softmax(-1)[:, 1:]
    torch.testing.assert_close(gate(inputs).double(), wanted, rtol=1e-5, atol=1e-6)
    assert bool((wanted.sum(-1) < 1).all()) and float(wanted.detach().std()) > 0.01


def test_a_gate_takes_confidences_in_the_place_of_logits() -> None:
    gate = HistoryGate(lmbdas=(0.4,))
    nn.init.normal_(gate.out.weight)
    inputs = some_inputs(1, 3)
    assert inputs.base_logits is not None
    given = GateInputs(
        confidences=confidences(inputs.base_logits, inputs.memory_logits), history=inputs.history
    )
    assert torch.equal(gate(given), gate(inputs))
    with pytest.raises(ValueError, match="GateInputs.history"):
        gate(GateInputs(confidences=given.confidences))
    with pytest.raises(ValueError, match="needs the logits"):
        gate(GateInputs(history=inputs.history))
    with pytest.raises(ValueError, match="last state"):
        learned("router", (0.4,))(given)


@pytest.mark.parametrize("num_memories", [1, 2])
def test_a_stored_gate_is_opened_by_its_kind(num_memories: int) -> None:
    assert open_gate({"kind": "constant"}, 0.4) == Constant(0.4)
    weights = Weights((0.1,) * num_memories)
    assert open_gate(weights.settings(), 0.4) == weights
    for kind in LEARNED:
        gate = learned(kind, (0.4 / num_memories,) * num_memories)
        opened = open_gate(json.loads(json.dumps(gate.settings())), 0.4)
        assert isinstance(opened, LearnedGate) and opened.settings() == gate.settings()
        inputs = some_inputs(num_memories, 3)
        torch.testing.assert_close(opened(inputs), gate(inputs))  # untrained, λ of the model
        nn.init.normal_(gate.out.weight)
        opened.load_state_dict(gate.state_dict())
        assert torch.equal(opened(inputs), gate(inputs))
        loaded = load_gate(gate.settings(), gate.state_dict())
        assert torch.equal(loaded(inputs), gate(inputs)) and not loaded.training
        with pytest.raises(ValueError, match="not those of the gate"):
            load_gate({**gate.settings(), "hidden": 3}, gate.state_dict())
    with pytest.raises(ValueError, match="no weights to load"):
        load_gate({"kind": "constant"}, {})
    assert {"constant", "weights", *LEARNED} <= set(GATES)
    with pytest.raises(ValueError, match="'oracle' is none of constant"):
        open_gate({"kind": "oracle"}, 0.4)
    with pytest.raises(ValueError, match=r"\[0, 1\], not 1.4"):
        open_gate({"kind": "constant"}, 1.4)


def test_a_gate_starts_near_an_end_where_that_is_best() -> None:
    for lmbda in (0.0, 1.0):
        weight = HistoryGate(lmbdas=(lmbda,))(some_inputs(1, 2))
        assert bool(((weight - lmbda).abs() <= 1.001e-4).all()) and bool((weight != lmbda).all())
    own = HistoryGate(lmbdas=(0.5,), ratio_decays=[0.9], base_decays=[])
    assert own.history == History(ratio_decays=(0.9,), base_decays=()) and own.history.size == 1
    assert own.settings()["ratio_decays"] == [0.9]
