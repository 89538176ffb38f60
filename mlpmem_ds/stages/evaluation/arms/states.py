"""An arm that reports nothing: the hidden states of base and memories, or the weights that a gate makes of
them, for gates that read states. A unit keeps them, since no later step can make them without the models.

n positions of a block, D width of the base's last state, H of a memory's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mlpmem_ds.engines.hidden_states import state_width
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.gate_features import join_confidences
from mlpmem_ds.models.gates import LearnedGate
from mlpmem_ds.models.mixture import GateInputs
from mlpmem_ds.stages.evaluation.arms.arm import Arm, Part, Price, Scores
from mlpmem_ds.stages.evaluation.arms.memory import MemoryArm, memory_scores, memory_states
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass, Scan

FINAL = CapturePoint(layer=-1, point="final_norm")


@dataclass(frozen=True, kw_only=True, eq=False)
class StatesArm(Arm):
    """Its values are float32 [n, D + ΣH], the base's last state and what each memory's head reads; of a gate
    [n, M], the weights that it gives."""

    name: str
    forward_pass: ForwardPass
    price: Price
    memories: Sequence[MemoryArm]
    gate: LearnedGate | None = None
    description: str = "hidden states for a gate"
    part: Part = "other"
    inputs: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads(self) -> Sequence[CapturePoint]:  # type: ignore[override]
        return (FINAL, *(memory.point for memory in self.memories))

    def sizes_of_states(self) -> list[int]:
        """D, then H of each memory."""
        return [
            state_width(self.forward_pass.source, FINAL),
            *(memory.memory.config.hidden_size for memory in self.memories),
        ]

    @torch.no_grad()
    def score(self, scan: Scan) -> Scores:
        states = [
            scan.states[FINAL],
            *(memory_states(arm.memory, scan.states[arm.point]).float().cpu() for arm in self.memories),
        ]
        values = torch.cat(states, dim=1) if self.gate is None else self._weights(self.gate, scan, states)
        return Scores(values=values.numpy(), guesses=np.empty((len(values), 0), dtype=np.float32))

    def _weights(self, gate: LearnedGate, scan: Scan, states: Sequence[torch.Tensor]) -> torch.Tensor:
        top_n1 = scan.top_ids_n[:, None]
        columns = []
        for arm in self.memories:
            found = memory_scores(arm.memory, scan.states[arm.point], top_n1)
            agrees_n = found.top_ids_N.cpu() == torch.from_numpy(scan.top_ids_n)
            parts = (found.entropies_N, found.top_N, agrees_n.float(), found.log_probabilities_NJ[:, 0])
            columns.append(torch.stack([part.float().cpu() for part in parts], dim=1))
        inputs = GateInputs(
            confidences=join_confidences(torch.from_numpy(scan.guesses_n3[:, [1, 0]]), columns),
            states={name: states[0] for name in gate.reads},
            memory_states=tuple(states[1:]),
        )
        return gate.weights(gate.features(inputs))
