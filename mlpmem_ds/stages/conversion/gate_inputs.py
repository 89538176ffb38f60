"""Part of `convert_checkpoint` and `generate`: a fitted gate, and the memories in its own order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.formats.gates import FittedGate
from mlpmem_ds.models.gates import load_gate
from mlpmem_ds.models.mixture import StoredGate


def places_in_gate(
    gate: FittedGate, sha256s: Sequence[str], roots: Sequence[Path], *, flag: str
) -> list[int]:
    """For each memory of the gate in turn, the place of the given one with its SHA-256.

    Raises:
        UserError: the gate was fitted for other memories than those of `flag`.
    """
    weighed = [memory.sha256 for memory in gate.manifest.memories]
    if sorted(weighed) != sorted(sha256s):
        missing = [memory.name for memory in gate.manifest.memories if memory.sha256 not in sha256s]
        extra = [str(root) for root, sha256 in zip(roots, sha256s, strict=True) if sha256 not in weighed]
        raise UserError(
            f"--gate {gate.root} weighs {len(weighed)} memories"
            f" ({', '.join(memory.name for memory in gate.manifest.memories)}), and {flag} gives {len(roots)}"
            + (f"; it lacks {', '.join(missing)}" if missing else "")
            + (f"; {', '.join(extra)} was not among them" if extra else "")
            + ": give the memories that it was fitted for, or run fit_gate with these"
        )
    return [list(sha256s).index(sha256) for sha256 in weighed]


def check_gate_base(gate: FittedGate, base_sha256: str, model: str) -> None:
    """Raises UserError unless the gate was fitted with this base."""
    if gate.manifest.base != base_sha256:
        raise UserError(
            f"--gate {gate.root} was fitted with another base ({gate.manifest.base[:12]}…) than --model"
            f" {model} ({base_sha256[:12]}…): give that base, or run fit_gate with this one"
        )


def stored_gate(gate: FittedGate) -> StoredGate:
    """The gate with its weights, in float32. Raises DamagedDataError where they do not fit its settings."""
    try:
        return load_gate(gate.manifest.gate, gate.weights)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DamagedDataError(
            f"the weights of --gate {gate.root} do not fit its manifest ({error}): run fit_gate again"
        ) from error
