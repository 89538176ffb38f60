"""Part of `convert_checkpoint`: a memory that the method's authors published → a memory of this project.

The published files do not name the base or the state that the memory reads. The authors' code reads the input
of the last block's MLP, which is the default; the user names the base and its tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.core.files import require_free_bytes
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.temporaries import written_bytes
from mlpmem_ds.core.unit_records import recorded_files
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.model_directory import absence_of
from mlpmem_ds.formats.reference_checkpoint import ReferenceMemory, open_reference
from mlpmem_ds.formats.trained_models import (
    ImportedMemory,
    MemoryManifest,
    Provenance,
    TrainedMemory,
    write_weights,
)
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.structure import resolve_layer
from mlpmem_ds.stages.conversion.config import Config
from mlpmem_ds.stages.shared_flags import Layer

_logger = logging.getLogger(__name__)
_UNIT = "weights"


@dataclass(frozen=True, kw_only=True)
class _Base:
    """The sizes of the base that a memory must fit."""

    num_layers: int
    width: int
    vocab_size: int


def read_reference(
    root: Path, *, name: str, model: str, base_sha256: str, vocabulary_sha256: str, input_layer: Layer
) -> TrainedMemory:
    """The published memory as a TrainedMemory, in float32.

    Args:
        root: the directory of the published files.
        name: of the memory, for the record and the model card.
        model: the base that it was trained for: a directory or Hub name.
        base_sha256: its fingerprint.
        vocabulary_sha256: of its tokenizer.
        input_layer: an index, negative from the end, or a fraction of the depth: where the memory's input is
            read.

    Raises:
        UserError: it cannot be read, or does not fit the base.
    """
    reference, base = open_reference(root), _read_base(model)
    memory = _check(reference, base, model)
    layer = _layer(input_layer, base)
    provenance = Provenance(
        base=base_sha256,
        vocabulary_sha256=vocabulary_sha256,
        key_layer=layer,
        key_point="ffn_input",
        input_layer=layer,
        input_point="ffn_input",
        input_layers_path=None,
        parameters=memory.num_parameters(),
        imported=ImportedMemory(name=name, kind=reference.model_type, sha256=reference.sha256),
    )
    weights = {ours: tensor.float() for ours, tensor in reference.tensors()}
    _logger.info(
        "%s: %d %s blocks, %s parameters",
        root,
        memory.num_blocks,
        memory.family,
        f"{memory.num_parameters():,}",
    )
    return TrainedMemory(
        sha256=reference.sha256, memory=memory.to_dict(), provenance=provenance, weights=weights
    )


def _read_base(model: str) -> _Base:
    try:
        config: Any = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config(decoder=True)
        return _Base(
            num_layers=config.num_hidden_layers, width=config.hidden_size, vocab_size=config.vocab_size
        )
    except Exception as error:  # a family of errors for each kind of configuration
        reason = first_line(error)
        if absence := absence_of(model, error=error):
            raise UserError(f"--model {model}: {absence}") from error
        raise UserError(f"--model {model} has no configuration of a language model ({reason})") from error


def _check(reference: ReferenceMemory, base: _Base, model: str) -> MemoryConfig:
    try:
        memory = MemoryConfig.from_dict(reference.memory)
    except ValueError as error:
        raise UserError(f"--from-reference {reference.root}: {error}") from error
    for what, size, expected in (
        ("reads vectors of width", memory.input_size, base.width),
        ("predicts a vocabulary of", memory.vocab_size, base.vocab_size),
    ):
        if size != expected:
            raise UserError(
                f"--from-reference {reference.root} {what} {size:,}, and --model {model} has {expected:,}:"
                " give the base that the memory was trained for"
            )
    return memory


def _layer(input_layer: Layer, base: _Base) -> int:
    try:
        return resolve_layer(input_layer, base.num_layers)
    except ValueError as error:
        raise UserError(f"--input-layer: {error}") from error


def is_last_layer(layer: int, model: str) -> bool:
    """Whether the memory's input is read where the authors' code reads it."""
    return layer == _read_base(model).num_layers - 1


def write_memory(
    config: Config, trained: TrainedMemory, read: Callable[[], TrainedMemory], world: World
) -> None:
    """Publish a memory that was imported, or read from a checkpoint, as a finished training leaves it.

    Args:
        config: the flags.
        trained: without its weights where a checkpoint still holds them.
        read: gives it with them; called where they are to be written.
        world: of this process.

    Raises:
        UserError: too small a disk, or another run's output.
    """
    if not any(recorded_files(config.output, [_UNIT])):  # else there is nothing to write, or to repair
        trained = read()
        needed = sum(tensor.numel() * tensor.element_size() for tensor in trained.weights.values())
        needed -= written_bytes(config.output, ".safetensors")
        require_free_bytes(config.output, needed, what="the memory's weights")
    imported = trained.provenance.imported
    directory = open_stage(
        config.output,
        stage=MemoryManifest.FORMAT,
        version=MemoryManifest.VERSION,
        config=config,
        inputs={
            "checkpoint" if imported is None else "reference": trained.sha256,
            "base": trained.provenance.base,
        },
        world=world,
        resolved={"from_reference": None if imported is None else imported.name},
    )
    manifest = MemoryManifest(memory=trained.memory, provenance=trained.provenance, training=None)

    def write(_: str, writer: UnitWriter) -> dict[str, Any]:
        weights = (trained if trained.weights else read()).weights
        write_weights(writer, weights, memory=trained.memory, provenance=trained.provenance)
        return {"parameters": sum(tensor.numel() for tensor in weights.values())}

    directory.run_units([_UNIT], write)
    directory.complete([_UNIT], lambda: manifest)
