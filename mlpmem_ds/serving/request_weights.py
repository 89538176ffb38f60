"""λ of single requests: read from a request, followed through the engine's batch, handed to the model.

An engine's model sees rows and no requests; somebody else in the same process knows which request has which
row. It leaves the weights of a step's rows in `STEP` before the model runs, and the model takes them with the
first logits that it makes.

Shapes: R rows of a step, M memories.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.gate_features import History
from mlpmem_ds.models.mixture import NOTHING, GateInputs, StoredGate, checked_lmbda

ARGUMENT = "lmbda"
"""Name of the request's argument."""


def requested_lmbda(arguments: Mapping[str, Any] | None) -> float | None:
    """λ among a request's further arguments; None: it names none. Raises ValueError outside [0, 1]."""
    value = (arguments or {}).get(ARGUMENT)
    return None if value is None else checked_lmbda(value)


class BatchWeights:
    """λ of the requests in a batch, by their rows, as requests come, move and go; without a λ: not kept."""

    def __init__(self) -> None:
        self._lmbdas: dict[int, float] = {}

    def put(self, row: int, lmbda: float | None) -> None:
        """A request stands in this row now, in the place of any other."""
        self._lmbdas.pop(row, None)
        if lmbda is not None:
            self._lmbdas[row] = lmbda

    def remove(self, row: int) -> None:
        self._lmbdas.pop(row, None)

    def move(self, source: int, target: int, *, swap: bool) -> None:
        """The request of `source` goes to `target`; with `swap` that one comes back, else its own is gone."""
        moved, other = self._lmbdas.get(source), self._lmbdas.get(target)
        self.put(target, moved)
        self.put(source, other if swap else None)

    def rows(self, num_rows: int) -> list[float] | None:
        """λ of each row, NaN where the request named none; None: no request named one."""
        if not self._lmbdas:
            return None
        return [self._lmbdas.get(row, math.nan) for row in range(num_rows)]


class StepWeights:
    """Hands the weights of one step's rows from who knows the requests to the model."""

    def __init__(self) -> None:
        self._lmbdas_R: torch.Tensor | None = None

    def put(self, lmbdas_R: torch.Tensor | None) -> None:
        """For the step that comes; NaN where the request named none."""
        self._lmbdas_R = lmbdas_R

    def take(self, num_rows: int) -> torch.Tensor | None:
        """Those of the step, once: the logits of prompts, made later in a step, belong to no such rows.

        Raises RuntimeError where they are of another number of rows: the engine selects rows in another way
        than this file takes for granted.
        """
        lmbdas_R, self._lmbdas_R = self._lmbdas_R, None
        if lmbdas_R is not None and len(lmbdas_R) != num_rows:
            raise RuntimeError(
                f"{len(lmbdas_R)} requests and {num_rows} rows of logits in one step: this version of the"
                " engine is not supported with a λ of single requests; leave out the logits processor"
            )
        return lmbdas_R


STEP = StepWeights()


@dataclass(frozen=True, kw_only=True)
class RequestGate:
    """A gate, but for rows whose request named a λ; the memories of a bank share that equally."""

    gate: StoredGate
    lmbdas_R: torch.Tensor
    num_memories: int

    @property
    def reads(self) -> Mapping[str, CapturePoint]:
        return self.gate.reads

    @property
    def history(self) -> History | None:
        return self.gate.history

    def __call__(self, inputs: GateInputs = NOTHING, /) -> torch.Tensor:
        """float64 [R], or [R, M] of a bank."""
        weights, own_R = self.gate(inputs), self.lmbdas_R
        if self.num_memories == 1:
            if isinstance(weights, torch.Tensor):
                weights = weights.to(own_R)  # fixed weights lie on the CPU, whichever device the rows are on
            return torch.where(own_R.isnan(), weights, own_R)
        if not isinstance(weights, torch.Tensor):
            weights = torch.full((self.num_memories,), weights / self.num_memories)
        own_RM = (own_R / self.num_memories)[:, None].expand(-1, self.num_memories)
        return torch.where(own_RM.isnan(), weights.to(own_RM), own_RM)

    def settings(self) -> dict[str, Any]:
        return self.gate.settings()

    def __str__(self) -> str:
        return f"{self.gate}, or the request's"
