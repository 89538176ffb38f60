"""Gates that learned the memories' weights from text, and the register of all gates that a model can hold.

A learned gate is a net of two layers over standardized features. Its last layer starts with zeros and the
bias of the best fixed weights: untrained it *is* those. It gives a softmax over base and memories, of one
memory the sigmoid. `fit_gate` trains it; `mixture` says what a gate is and mixes by it.

To add a gate: a class here or in `mixture`, its line in `GATES`, and one in `formats/README.md` for what is
stored of it.

This file travels with exported models as remote code: it imports torch and the standard library only.

Shapes: `...` any leading dimensions, F features, M memories.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from .capture_point import CapturePoint
from .gate_features import History, confidences, num_confidences
from .memory_config import DEFAULT_LAMBDA
from .mixture import NOTHING, Constant, GateInputs, StoredGate, Weights, checked_lmbda

_MIN_WEIGHT = 1e-4  # of a weight that a net starts from: a logit cannot be that of 0


class LearnedGate(nn.Module):
    """Features → standardized → hidden (GELU) → softmax over base and memories."""

    kind: ClassVar[str]
    reads: Mapping[str, CapturePoint] = MappingProxyType({})
    history: History | None = None
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, num_features: int, *, hidden: int, lmbdas: Sequence[float], num_inputs: int | None = None
    ) -> None:
        """`lmbdas`, a weight for each memory, is what it gives untrained; `num_inputs` of the first layer,
        where they are not the features themselves."""
        super().__init__()
        self.num_memories, self.hidden = len(lmbdas), hidden
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.layer = nn.Linear(num_inputs or num_features, hidden)
        self.out = nn.Linear(hidden, self.num_memories)
        self.start_from(lmbdas)

    @torch.no_grad()
    def start_from(self, lmbdas: Sequence[float]) -> None:
        """Forget what was learned: these weights at every position, each at least .0001, as the base's is."""
        weights = torch.tensor([1 - sum(lmbdas), *lmbdas], dtype=torch.float64).clamp_min(_MIN_WEIGHT)
        self.out.weight.zero_()
        self.out.bias.copy_(torch.log(weights[1:] / weights[0]))

    @torch.no_grad()
    def standardize(self, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        """Take the features' mean and standard deviation [F]; a feature that never varies is left out."""
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0.0))

    def features(self, inputs: GateInputs) -> torch.Tensor:
        """[..., F]. Raises ValueError where the host gave too little."""
        raise NotImplementedError

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [..., M]: log of each memory's weight over the base's.

        A feature that is NaN is not known, as before a memory has run, and counts as the average one.
        """
        standardized = (features.to(self.mean.dtype) - self.mean) * self.scale
        standardized = torch.where(standardized.isnan(), 0.0, standardized)
        result: torch.Tensor = self.out(functional.gelu(self.layer(self.encode(standardized))))
        return result.float()

    def encode(self, standardized: torch.Tensor) -> torch.Tensor:
        """What the first layer reads."""
        return standardized

    def weights(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [..., M], from features [..., F]."""
        scores = self.scores(features)
        if self.num_memories == 1:
            return scores.sigmoid()
        return functional.pad(scores, (1, 0)).softmax(dim=-1)[..., 1:]

    def forward(self, inputs: GateInputs = NOTHING, /) -> torch.Tensor:
        """float32 [...] of one memory, [..., M] of a bank."""
        weights = self.weights(self.features(inputs))
        return weights[..., 0] if self.num_memories == 1 else weights

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "num_memories": self.num_memories, "hidden": self.hidden}

    def __str__(self) -> str:
        return f"gate: {self.kind}"

    def _confidences(self, inputs: GateInputs) -> torch.Tensor:
        if inputs.confidences is not None:
            return inputs.confidences
        if inputs.base_logits is None or len(inputs.memory_logits) != self.num_memories:
            raise ValueError(
                f"the gate `{self.kind}` of {self.num_memories} memories needs the logits of the base and of"
                f" each memory; it got those of {len(inputs.memory_logits)}"
            )
        return confidences(inputs.base_logits, inputs.memory_logits)


class ConfidencesGate(LearnedGate):
    """From how sure both distributions are."""

    kind = "confidences"

    def __init__(self, *, lmbdas: Sequence[float], hidden: int = 32) -> None:
        super().__init__(num_confidences(len(lmbdas)), hidden=hidden, lmbdas=lmbdas)

    def features(self, inputs: GateInputs) -> torch.Tensor:
        return self._confidences(inputs)


class HistoryGate(LearnedGate):
    """From how sure both distributions are, and how well each predicted the tokens before."""

    kind = "history"
    history: History

    def __init__(
        self,
        *,
        lmbdas: Sequence[float],
        hidden: int = 32,
        ratio_decays: Sequence[float] = History.ratio_decays,
        base_decays: Sequence[float] = History.base_decays,
    ) -> None:
        history = History(
            ratio_decays=tuple(ratio_decays), base_decays=tuple(base_decays), num_memories=len(lmbdas)
        )
        super().__init__(num_confidences(len(lmbdas)) + history.size, hidden=hidden, lmbdas=lmbdas)
        self.history = history

    def features(self, inputs: GateInputs) -> torch.Tensor:
        scalars = self._confidences(inputs)
        if inputs.history is None:
            raise ValueError(
                "the gate `history` needs the history of past tokens: the host keeps it as"
                " `gate.history` says, and gives it in GateInputs.history"
            )
        return torch.cat([scalars, inputs.history.to(scalars)], dim=-1)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self.history.settings()}


class RouterGate(LearnedGate):
    """From the hidden states of base and memories and how sure they are, as the router of MemSFT: each scalar
    becomes 64 numbers first, and the hidden layer is 128 wide."""

    kind = "router"
    reads = MappingProxyType({"final": CapturePoint(layer=-1, point="final_norm")})
    _ENCODED = 64

    def __init__(
        self, *, lmbdas: Sequence[float], base_size: int, memory_sizes: Sequence[int], hidden: int = 128
    ) -> None:
        self.base_size, self.memory_sizes = base_size, tuple(memory_sizes)
        states, scalars = base_size + sum(memory_sizes), num_confidences(len(lmbdas))
        super().__init__(
            states + scalars, hidden=hidden, lmbdas=lmbdas, num_inputs=states + scalars * self._ENCODED
        )
        self.scalars = nn.ModuleList(nn.Linear(1, self._ENCODED) for _ in range(scalars))

    def features(self, inputs: GateInputs) -> torch.Tensor:
        if "final" not in inputs.states or len(inputs.memory_states) != self.num_memories:
            raise ValueError(
                "the gate `router` needs the base's last state, and of each memory what its head reads"
            )
        scalars = self._confidences(inputs)
        states = [state.to(scalars) for state in (inputs.states["final"], *inputs.memory_states)]
        return torch.cat([*states, scalars], dim=-1)

    def encode(self, standardized: torch.Tensor) -> torch.Tensor:
        states = standardized[..., : -len(self.scalars)]
        scalars = standardized[..., -len(self.scalars) :].split(1, dim=-1)
        encoded = [
            functional.relu(layer(scalar)) for layer, scalar in zip(self.scalars, scalars, strict=True)
        ]
        return torch.cat([states, *encoded], dim=-1)

    def settings(self) -> dict[str, Any]:
        sizes = {"base_size": self.base_size, "memory_sizes": list(self.memory_sizes)}
        return {**super().settings(), **sizes}


def _learned(build: Callable[..., LearnedGate]) -> Callable[[float, Mapping[str, Any]], StoredGate]:
    """How a stored gate of this class is opened: its weights, which are loaded afterwards, hold what it
    learned, `lmbda` what it gives before."""

    def open_stored(lmbda: float, settings: Mapping[str, Any]) -> StoredGate:
        others = dict(settings)
        num_memories = others.pop("num_memories", 1)
        return build(lmbdas=[lmbda / num_memories] * num_memories, **others)

    return open_stored


GATES: Mapping[str, Callable[[float, Mapping[str, Any]], StoredGate]] = {
    "constant": lambda lmbda, _: Constant(lmbda),
    "weights": lambda _, settings: Weights(tuple(settings["lmbdas"])),
    "history": _learned(HistoryGate),
    "confidences": _learned(ConfidencesGate),
    "router": _learned(RouterGate),
}
"""The gates that a model can hold: kind → function of the model's `lmbda` and the gate's other settings."""


def load_gate(settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> LearnedGate:
    """A fitted gate from its settings and the state dict of its net, which is not trained further.

    Raises:
        ValueError: the settings are not of a learned gate, or the weights are of another.
    """
    gate = open_gate(settings, DEFAULT_LAMBDA)
    if not isinstance(gate, LearnedGate):
        raise ValueError(f"a gate of the kind {settings.get('kind')!r} has no weights to load")
    try:
        gate.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights are not those of the gate {dict(settings)}: {error}") from error
    return gate.eval().requires_grad_(False)


def open_gate(settings: Mapping[str, Any], lmbda: float) -> StoredGate:
    """The gate that `StoredGate.settings` described; the weights of a learned one are loaded afterwards.

    Raises:
        ValueError: this version does not have the kind, or λ is out of range.
    """
    others = dict(settings)
    kind = others.pop("kind", None)
    if kind not in GATES:
        raise ValueError(
            f"the gate's kind {kind!r} is none of {', '.join(GATES)}: it needs a newer version of this code"
        )
    return GATES[kind](checked_lmbda(lmbda), others)
