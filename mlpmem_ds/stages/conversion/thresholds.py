"""A warning of what `--base-only-threshold` does where no gate varies the memory's weight."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mlpmem_ds.models.mixture import Constant, StoredGate, Weights

_logger = logging.getLogger(__name__)


def warn_of_fixed_weights(threshold: float | None, gates: Sequence[StoredGate], num_memories: int) -> None:
    """One warning where the weights are the same at every position: then the threshold changes nothing, or
    leaves a memory out everywhere.

    Args:
        threshold: the flag; None: it was not given.
        gates: all that the model is used with.
        num_memories: M, which share a constant weight equally.
    """
    if threshold is None or not gates:
        return
    out = []
    for gate in gates:
        if not isinstance(gate, Constant | Weights):
            return
        weights = (gate.lmbda / num_memories,) if isinstance(gate, Constant) else gate.lmbdas
        out += [f"{weight:g}" for weight in weights if 0 < weight < threshold]
    effect = "changes nothing"
    if out:
        effect = f"leaves the memory out everywhere, because its weight is {', '.join(dict.fromkeys(out))}"
    _logger.warning(
        "--base-only-threshold %g is for a gate (--gate), and here the weight is the same at every position:"
        " it %s",
        threshold,
        effect,
    )
