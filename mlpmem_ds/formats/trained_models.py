"""What a finished training leaves: manifests of memories and bases, a memory's weights. See README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import canonical_json, link_or_copy, read_json
from mlpmem_ds.core.manifest import CompleteStage, Manifest, read_stage
from mlpmem_ds.core.typed_json import from_json, to_json
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.formats.keys import Point
from mlpmem_ds.formats.weight_shards import WeightFiles

PROVENANCE_FIELD = "provenance"
"""of the subject of a memory's checkpoints"""
_SAYS_AGAIN = ("objective_reason", "recipe", "recipe_changes")


@dataclass(frozen=True, kw_only=True)
class ImportedMemory:
    """A memory that others published: its name, the kind of its network, the SHA-256 of shape and files."""

    name: str
    kind: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a memory was made from and for; None = it does not apply, or is not known (an imported memory).

    `base`, `key_model` fingerprints of models; `corpus`, `keys`, `targets`, `init_from` SHA-256 of what it
    was trained from; `steps` planned, in the files of a training; of a memory that was read those done, and
    then `steps_planned` where they were more;
    `objective_reason` why `--objective auto` chose the objective; `recipe` by name, and what of it was
    changed; `control` which control it is, if it is no memory to be used.
    """

    base: str
    vocabulary_sha256: str
    input_layer: int
    input_point: Point
    input_layers_path: str | None
    key_layer: int | None
    key_point: Point | None
    parameters: int
    input_earlier_layers: tuple[int, ...] = ()
    steps: int | None = None
    steps_planned: int | None = None
    key_model: str | None = None
    corpus: str | None = None
    keys: str | None = None
    targets: str | None = None
    init_from: str | None = None
    objective: str | None = None
    objective_reason: str | None = None
    recipe: str | None = None
    recipe_changes: Mapping[str, Any] | None = None
    control: Literal["random-memory", "permuted-targets"] | None = None
    alpha: float | None = None
    ce_through: str | None = None
    mixture_lambda: float | None = None
    joined_lambda: float | None = None
    start: str | None = None
    head: str | None = None
    epochs: float | None = None
    batch_positions: int | None = None
    seed: int | None = None
    begin_of_window_ids: tuple[int, ...] | None = None
    """tokens before the text that it was trained on, as in the keys"""
    imported: ImportedMemory | None = None

    @property
    def num_positions_read(self) -> int | None:
        """Positions of all training steps; None where it is not known: those of a memory that the training
        started from count too."""
        if self.steps is None or self.batch_positions is None or self.init_from is not None:
            return None
        return self.steps * self.batch_positions

    def after(self, steps: int) -> Provenance:
        """That of a training which was planned, after so many of its steps."""
        return replace(self, steps=steps, steps_planned=self.steps)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended: `steps` of `rows_per_step` positions or tokens, the step whose weights were
    written, and each validation's figures."""

    steps: int
    rows_per_step: int
    selected_step: int
    validations: tuple[Mapping[str, Any], ...]

    @property
    def is_past_best(self) -> bool | None:
        """Whether it was validated best before its last step; if not, more steps might have made it better.
        None where it was not validated."""
        found = [(one["perplexity"], one["step"]) for one in self.validations]
        found = [(perplexity, step) for perplexity, step in found if perplexity is not None]
        return min(found)[1] < self.steps if found else None


@dataclass(frozen=True, kw_only=True)
class MemoryManifest(Manifest):
    """A trained memory: `memory` its shape (`MemoryConfig.to_dict()`); `training` None where it was imported
    or taken from a checkpoint."""

    FORMAT: ClassVar[str] = "memory"
    VERSION: ClassVar[int] = 1

    memory: Mapping[str, Any]
    provenance: Provenance
    weights_dtype: Literal["float32"] = "float32"
    training: TrainingResult | None


@dataclass(frozen=True, kw_only=True)
class BaseManifest(Manifest):
    """A base that `train_base` made: `base` its configuration as plain values."""

    FORMAT: ClassVar[str] = "base"
    VERSION: ClassVar[int] = 1

    base: Mapping[str, Any]
    weights_dtype: Literal["float32"] = "float32"
    training: TrainingResult


@dataclass(frozen=True, kw_only=True)
class BaselineManifest(Manifest):
    """What `train_baseline` made of a base: `kind` how, `base` the result's configuration as plain values.

    `parameters_matched`: what a memory has, to which the trained parameters were fitted, or those beyond the
    base's; None where nothing was. `rank`, `alpha` of low-rank matrices.
    """

    FORMAT: ClassVar[str] = "baseline"
    VERSION: ClassVar[int] = 1

    kind: Literal["continued", "lora", "bigger"]
    base: Mapping[str, Any]
    weights_dtype: Literal["float32"] = "float32"
    training: TrainingResult
    parameters: int
    parameters_trained: int
    parameters_matched: int | None
    rank: int | None
    alpha: float | None


@dataclass(frozen=True, kw_only=True)
class MemoryDescription:
    """weights/config.json: the memory in weights/model.safetensors, or in its shards."""

    format: Literal["mlpmem-memory"] = "mlpmem-memory"
    version: int = MemoryManifest.VERSION
    memory: Mapping[str, Any]
    provenance: Provenance


@dataclass(frozen=True, kw_only=True)
class MemorySubject:
    """The `subject` of a checkpoint of a memory."""

    memory: Mapping[str, Any]
    provenance: Provenance


def deciding_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What two trainings can differ in, of a provenance as plain values: not what says the same flags again,
    and nothing that is at its default, which an earlier program may not have written."""
    return {
        name: value
        for name, value in provenance.items()
        if name not in _SAYS_AGAIN and value not in (None, [])
    }


def write_weights(
    writer: UnitWriter,
    weights: Mapping[str, torch.Tensor],
    *,
    memory: Mapping[str, Any],
    provenance: Provenance,
) -> None:
    """Write `weights/model.safetensors` and `weights/config.json` of a memory that is in memory.

    Args:
        writer: the unit's writer of the training's stage directory.
        weights: a plain `Memory`'s state dict.
        memory: `MemoryConfig.to_dict()`.
        provenance: what the memory was made from and for.
    """
    with writer.file("weights/model.safetensors") as path:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"}
        )
        path.chmod(0o644)
    _describe_weights(writer, memory, provenance)


def take_weights(
    writer: UnitWriter, files: WeightFiles, *, memory: Mapping[str, Any], provenance: Provenance
) -> None:
    """The same with weights that a training has written to files, which may be several; they stay."""
    for source in files.paths():
        with writer.file(f"weights/model{source.name.removeprefix(files.stem)}") as path:
            if source.suffix == ".safetensors":
                link_or_copy(source, path)
            else:
                path.write_bytes(source.read_bytes().replace(f'"{files.stem}-'.encode(), b'"model-'))
            path.chmod(0o644)
    _describe_weights(writer, memory, provenance)


def _describe_weights(writer: UnitWriter, memory: Mapping[str, Any], provenance: Provenance) -> None:
    with writer.file("weights/config.json") as path:
        path.write_bytes(canonical_json(to_json(MemoryDescription(memory=memory, provenance=provenance))))


@dataclass(frozen=True, kw_only=True)
class TrainedMemory:
    """A trained memory as read from disk: `memory` is a MemoryConfig's dict, `weights` a plain Memory's state
    dict. The provenance has the steps done, where the files have the planned ones."""

    sha256: str
    memory: Mapping[str, Any]
    provenance: Provenance
    weights: dict[str, torch.Tensor] = field(repr=False)


def read_weights(root: Path, *, flag: str = "--memory") -> TrainedMemory:
    """Read the weights that a finished training left in OUTPUT/weights.

    Raises:
        UserError: no finished training there.
        DamagedDataError: files missing, of another size or version, or unreadable.
    """
    stage: CompleteStage[MemoryManifest] = read_stage(CompleteStage, MemoryManifest, root, flag=flag)
    stage.check_files(["weights/config.json"])
    described = read_memory_description(root / "weights" / "config.json")
    try:
        files = WeightFiles(root=root / "weights")
        stage.check_files(path.relative_to(root).as_posix() for path in files.paths())
        weights = files.read()
    except (OSError, DamagedDataError) as error:
        raise DamagedDataError(
            f"the weights of {root} cannot be read ({error}): run the training again, it writes them from its"
            " last checkpoint"
        ) from error
    provenance, result = described.provenance, stage.manifest.training
    if result is not None and result.steps != provenance.steps:
        provenance = provenance.after(result.steps)
    return TrainedMemory(sha256=stage.sha256, memory=described.memory, provenance=provenance, weights=weights)


def read_memory_description(path: Path) -> MemoryDescription:
    """Read a weights/config.json.

    Raises:
        DamagedDataError: it is missing, or of another format or version.
    """
    return from_json(MemoryDescription, read_json(path), where=str(path), version=MemoryManifest.VERSION)
