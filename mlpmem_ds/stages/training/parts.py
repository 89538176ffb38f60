"""Part of `train` and `train_base`: what a training is put together from, as protocols.

A `Training` (training.py) runs any `Objective` on any `Batches`, and asks a `Validator` now and then which
weights are the best. `train` and `train_base` each build one of every kind and start it. objectives.py says
how another objective of the memory is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from mlpmem_ds.engines.deepspeed.engine import Engine
from mlpmem_ds.stages.training.validation import Validation


class Objective(Protocol):
    """What is trained, and the loss that it is trained for."""

    @property
    def rows(self) -> str:
        """What the rows of a batch are called in logs and metrics: `positions`, `tokens`."""

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of the sums over a micro-batch's rows that a forward returns after the loss.

        One that is called `weight` divides the others in the logs.
        """

    @property
    def flops_per_row(self) -> float:
        """Of forward and backward; 0 = unknown, and no MFU is logged."""

    def make_module(self) -> nn.Module:
        """The module whose forward is the loss: `(mean loss, sums)` or `(mean loss,)` of a micro-batch.

        Called under `zero.Init` at ZeRO stage 3: each leaf has to initialize itself in its own `__init__`.
        What is not to be trained has `requires_grad` False.
        """

    def arguments(
        self, micro_batch: Any, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor | Any, ...]:
        """A micro-batch of the `Batches` as the forward takes it, on the device that computes.

        It waits for no copy, and keeps nothing of the micro-batch's own memory, which the next one goes
        through.
        """


class Batches(Protocol):
    """Which rows each step takes: of the step's number alone, at any number of ranks, or of what was read."""

    @property
    def may_run_ahead(self) -> bool:
        """Whether a thread may take the stream ahead of the training; not where ranks compute together."""

    def stream(self, first: int, stop: int) -> Iterator[tuple[Sequence[Any], float]]:
        """This rank's micro-batches of the steps [first, stop), and the seconds waited for each step's."""

    def state_after(self, step: int) -> Any:
        """What a checkpoint after so many steps keeps of the reading: plain values, the same on every rank;
        None where the step's number says all. Collective."""

    def continue_from(self, state: Any) -> None:
        """Before `stream`: go on where that checkpoint was."""

    def faulty_positions(self, step: int) -> list[int]:
        """The positions of this rank's rows of a step that hold a number which is not finite."""


class Validator(Protocol):
    """Scores the weights as they are."""

    def run(self, engine: Engine, step: int) -> Validation:
        """After so many steps; collective: every rank calls it, and gets the same."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How long a training is."""

    count: int
    rows: int
    """of each step, over all ranks"""
    per_pass: int | None = None
    """steps of one pass over the data, where that is a whole number: the last step of a pass is logged"""
    validate_every: int = 0
    """steps between validations, the last step is validated too; 0 = no validation"""
