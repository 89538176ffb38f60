"""Read and write a fitted gate: its net, and what it was fitted to. See README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.manifest import CompleteStage, Manifest, read_stage
from mlpmem_ds.core.unit_writer import UnitWriter

WEIGHTS_NAME = "gate.safetensors"


@dataclass(frozen=True, kw_only=True)
class GateMemory:
    """A memory that a gate weighs: the name that it was given, and its SHA-256 (of a training's manifest, or
    the fingerprint of an export); or a second language model, by its fingerprint."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class WeightFigures:
    """The memories' weights over a text: mean weight of each memory; mean of their sum λ, and its quantiles
    at .05, .25, .5, .75 and .95."""

    means: tuple[float, ...]
    mean: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class GateText:
    """A text that a gate was fitted to. Perplexities are of the positions that chose when to stop."""

    corpus: str
    """SHA-256"""
    name: str
    """of its directory"""
    split: str
    part: Literal["domain", "general"]
    documents: int
    positions: int
    stopping_positions: int
    base_ppl: float
    memory_ppl: tuple[float, ...]
    """of each memory alone"""
    fixed_ppl: float
    """at the best fixed weights of all texts together"""
    own_fixed_ppl: float
    """at the best fixed weights of this text"""
    own_fixed: tuple[float, ...]
    """those weights"""
    gate_ppl: float
    weights: WeightFigures


@dataclass(frozen=True, kw_only=True)
class GateManifest(Manifest):
    """A fitted gate: `gate` its settings (`StoredGate.settings()`), `fixed` the best fixed weights of all
    texts together, from which it began; `epochs` done, of which `best_epoch` was kept (0: the fixed
    weights)."""

    FORMAT: ClassVar[str] = "gate"
    VERSION: ClassVar[int] = 1

    base: str
    """fingerprint"""
    vocabulary_sha256: str
    memories: tuple[GateMemory, ...]
    gate: Mapping[str, Any]
    fixed: tuple[float, ...]
    epochs: int
    best_epoch: int
    texts: tuple[GateText, ...]


@dataclass(frozen=True, kw_only=True)
class FittedGate(CompleteStage[GateManifest]):
    """A complete gate directory; `weights` is the state dict of its net."""

    weights: dict[str, torch.Tensor] = field(repr=False, hash=False)


def write_gate_weights(writer: UnitWriter, weights: Mapping[str, torch.Tensor]) -> None:
    """Write gate.safetensors."""
    with writer.file(WEIGHTS_NAME) as path:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"}
        )
        path.chmod(0o644)


def read_gate(root: Path, *, flag: str = "--gate") -> FittedGate:
    """Read a complete gate directory.

    Raises:
        UserError: no finished fit there.
        DamagedDataError: files missing, of another size or version, or unreadable.
    """
    stage: CompleteStage[GateManifest] = read_stage(CompleteStage, GateManifest, root, flag=flag)
    stage.check_files([WEIGHTS_NAME])
    try:
        weights = load_file(root / WEIGHTS_NAME)
    except Exception as error:  # safetensors raises a family of its own
        raise DamagedDataError(
            f"{root / WEIGHTS_NAME} cannot be read ({error}): run fit_gate again"
        ) from error
    return FittedGate(
        root=stage.root,
        sha256=stage.sha256,
        inputs=stage.inputs,
        config=stage.config,
        files=stage.files,
        manifest=stage.manifest,
        weights=weights,
    )
