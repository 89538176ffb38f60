"""What an arm of an evaluation is: one way to predict the next token, with its price.

An arm *stands alone* (the base, another language model), or its distribution is mixed with the base's, with a
weight λ that is chosen afterwards from the stored numbers. `evaluate` loops over arms and never asks which
kind one is. A new kind is a file like the others of this folder with its own `open_arms`, a line in `OPENERS`
(../inputs.py) and a flag (../config.py).

n positions of a block, T choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from mlpmem_ds.core.log import seconds_of_stage
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.maths.head_scores import HeadScores
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass, Scan


@dataclass(frozen=True, kw_only=True)
class Price:
    """What an arm costs to keep and to make; None where it is not known."""

    parameters: int
    bytes: int
    """on disk, the base's included where the arm needs it"""
    seconds: float | None
    """wall clock of the stages that the arm needs and the base does not"""
    tokens: int | None
    """read to make it, beyond the base's own training, each time that they were read"""

    def plus(self, *, parameters: int = 0, bytes: int, seconds: float | None, tokens: int | None) -> Price:
        """The price of an arm that needs this one too: parameters and bytes add up."""
        return replace(
            self,
            parameters=self.parameters + parameters,
            bytes=self.bytes + bytes,
            seconds=seconds,
            tokens=tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an arm says of a block's positions, in natural logarithms, float32."""

    values: np.ndarray
    """log-probability of the value, [n]; or [n, T], a column for each of the arm's choices. -inf is allowed
    only in an arm that is mixed with the base."""
    guesses: np.ndarray
    """Of one guessed token a position. An arm that stands alone guesses its own likeliest token: [n, 3],
    log-probability, entropy of the distribution, and 1 where the guess is the value. Another arm gives the
    log-probability of the *base's* likeliest token, in the shape of `values`."""
    confidences: np.ndarray | None = None
    """[n, 3], from an arm that a gate may weigh: the entropy of its distribution in nats, the log-probability
    of its likeliest token, and 1 where that is the base's likeliest too"""


def scores_beside_base(found: HeadScores, scan: Scan) -> Scores:
    """Of a distribution that a gate may weigh against the base's. The tokens of `found` are the value and the
    base's likeliest token (`tokens_beside_base`)."""
    named_n2 = found.log_probabilities_NJ.cpu().numpy()
    agrees_n = found.top_ids_N.cpu() == torch.from_numpy(scan.top_ids_n)
    confidences = (found.entropies_N.cpu(), found.top_N.cpu(), agrees_n.float())
    return Scores(
        values=named_n2[:, 0].copy(),
        guesses=named_n2[:, 1].copy(),
        confidences=torch.stack(confidences, dim=1).numpy(),
    )


def tokens_beside_base(scan: Scan) -> np.ndarray:
    """int64 [n, 2]: the value, and the base's likeliest token."""
    return np.stack([scan.values_n, scan.top_ids_n], axis=1)


Part = Literal["base", "subject", "reference", "control", "other"]
"""What an arm stands for in the report. Each is compared with the base, and with the subject, which is the
memory of `--memory`. The reference, kNN over all keys, is the measure of the subject's gain; the controls are
what the subject should be better than."""


class Arm(Protocol):
    """One way to predict. A class that inherits from this takes over what has a value here."""

    name: str
    """letters, digits, underscores; `base+…` for one that is mixed with the base"""
    description: str
    """what it is, in a sentence for the report: no capital at its start, no full stop at its end"""
    forward_pass: ForwardPass
    """whose pass over the text it reads: the base's, or that of a model of its own"""
    price: Price
    inputs: Mapping[str, str]
    """name → SHA-256 of what it was opened from: a report is continued only with the same"""
    part: Part
    settings: Mapping[str, Any]
    """plain values that a reader of the report may need"""
    resolved: Mapping[str, Any]
    """flag of identity "resolved" → the value that the arm made of it, which decides its scores"""
    stands_alone: bool = False
    """whether its own distribution is reported; else it is mixed with the base's"""
    reads: Sequence[CapturePoint] = ()
    """hidden states of the pass that `score` needs"""
    gives_zeros: bool = False
    """whether it gives some tokens no probability at all, so that λ = 1 is not among its choices"""
    choices: Sequence[Mapping[str, float]] = ()
    """what each column of its scores was made with, by name (neighbours, temperature): the best is chosen on
    the tuning split; none for an arm with one column"""
    trained_on: Sequence[tuple[str, str]] = ()
    """texts that it holds or was trained on (SHA-256 of the corpus, split): it is not judged on them"""
    sizes: Sequence[int] = ()
    """sizes of its datastore at which its speed is measured; none where it has no datastore"""

    def verify(self, stage: StageDirectory) -> None:
        """Compare the files that it reads while it scores with their checksums, each once over all ranks and
        starts of this report; all ranks call it, before any unit.

        Raises:
            DamagedDataError: on the rank that finds a file with another checksum.
        """
        return

    def load(self) -> None:
        """Read what stays in memory from one unit to the next, so that no unit's clock counts it."""
        return

    def score(self, scan: Scan) -> Scores:
        """Score a block's positions from what the pass gave of them."""
        ...

    def joint_model(self, lmbda: float, chosen: Mapping[str, float]) -> Any | None:
        """Base and arm as one model that generates text, at this λ and what else was chosen; None for an arm
        that cannot."""
        return None

    def at_size(self, size: int) -> Arm:
        """The same arm with the first `size` entries of its datastore, ready to score."""
        assert size in self.sizes
        return self


def sum_of_logs(roots: Sequence[Path | None]) -> float | None:
    """Seconds that these stages took, from their logs; None where a directory is not there or has no log."""
    logged = [None if root is None else seconds_of_stage(root) for root in roots]
    return None if None in logged else sum(seconds for seconds in logged if seconds is not None)
