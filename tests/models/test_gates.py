"""The joint model and its gate: λ for all positions, a gate that learned it for each, and who mixes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mlpmem_ds.models import mixture
from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MEMORY_INPUT, MemoryAugmentedLM
from mlpmem_ds.models.mixture import Constant, GateInputs, log_mixture_of_logits
from mlpmem_ds.models.mixture_on_device import mixture_on_device

from .conftest import POINT, WIDTH, expected_log_probabilities, random_ids, tiny_base, tiny_joint, tiny_memory


def test_lmbda_is_settable_and_exact_at_its_ends() -> None:
    joint, ids_BS = tiny_joint("gpt2"), random_ids()
    joint.lmbda = 0
    assert torch.equal(joint(ids_BS).logits, joint.base(ids_BS).logits)
    for lmbda in (1.0, 0.9):
        joint.lmbda = lmbda
        torch.testing.assert_close(
            joint(ids_BS).logits.double(),
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


class LearnedGate(nn.Module):
    """λ from the base's entropy and two of its states, one of them the memory's own input."""

    reads = {"middle": CapturePoint(layer=1, point="layer_output")}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * width + 1, 1)

    def forward(self, inputs: GateInputs, /) -> torch.Tensor:
        assert inputs.base_logits is not None and inputs.memory_logits is not None
        assert inputs.base_logits.shape == inputs.memory_logits.shape
        log_base = inputs.base_logits.log_softmax(-1)
        entropy = -(log_base.exp() * log_base).sum(-1, keepdim=True)
        features = torch.cat([entropy, inputs.states["middle"], inputs.states[MEMORY_INPUT]], dim=-1)
        weight: torch.Tensor = self.layer(features).sigmoid()[..., 0]
        return weight

    def settings(self) -> dict[str, object]:
        return {"kind": "learned", "width": WIDTH}


@torch.no_grad()
def test_a_learned_gate_is_one_more_member(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(lmbda: float, settings: Mapping[str, Any]) -> LearnedGate:
        assert lmbda == 0.4
        return LearnedGate(settings["width"])

    monkeypatch.setattr(mixture, "GATES", {**mixture.GATES, "learned": build})
    base, ids_BS = tiny_base("llama"), random_ids()
    joint = MemoryAugmentedLM.from_parts(base, tiny_memory(), lmbda=0.4, input_point=POINT)
    torch.manual_seed(1)
    gate = LearnedGate(WIDTH)
    joint.set_gate(gate)
    states = capture(base, [POINT, gate.reads["middle"]])(ids_BS).states
    base_logits, memory_logits = base(ids_BS).logits, joint.memory.head(joint.memory(states[POINT]))
    inputs = GateInputs(
        base_logits=base_logits,
        memory_logits=memory_logits,
        states={"middle": states[gate.reads["middle"]], MEMORY_INPUT: states[POINT]},
    )
    lmbda_BS = gate(inputs)
    assert lmbda_BS.shape == ids_BS.shape and float(lmbda_BS.std()) > 0.01
    expected_BSV = log_mixture_of_logits(base_logits, memory_logits, lmbda_BS)
    torch.testing.assert_close(joint(ids_BS).logits, expected_BSV, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(joint, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids_BS).logits, expected_BSV, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    last_BV = joint(ids_BS, logits_to_keep=1).logits[:, -1]
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
    torch.testing.assert_close(joint(ids_BS).logits.double(), expected_BSV, rtol=1e-5, atol=1e-5)
