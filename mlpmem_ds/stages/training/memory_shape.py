"""Part of `train`: the shape of the memory, from the flags or from the memory that it starts from."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlpmem_ds.core.config import flag_name
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.models.memory_config import PRESETS, MemoryConfig
from mlpmem_ds.stages.training.base_start import BaseStart
from mlpmem_ds.stages.training.config import SHAPE_FLAGS, Config
from mlpmem_ds.stages.training.initial_memory import InitialMemory, check_fits
from mlpmem_ds.stages.training.inputs import TrainingInputs


def memory_shape(
    config: Config, inputs: TrainingInputs, input_size: int, start: BaseStart | None = None
) -> MemoryConfig:
    """The memory's shape, for inputs of this width; `start` is what it takes from the base.

    It has as many outputs as the base's head, which may be padded beyond the tokenizer's entries: the two are
    mixed.

    Raises:
        UserError: the flags contradict each other, or the memory of --init-from.
    """
    vocab_size = inputs.keys.manifest.head_size
    if inputs.initial is not None:
        return _shape_of(inputs.initial, config, inputs, input_size, vocab_size)
    fields: dict[str, Any] = {} if start is None else dict(start.fields)
    fields["window"] = config.window
    preset = None if config.preset is None else PRESETS[config.preset](vocab_size)
    hidden_size = config.hidden_size or input_size // (len(inputs.point.parts) * config.window)
    if preset is not None:
        hidden_size = preset.hidden_size
    if start is not None:
        start.check_fits(vocab_size=vocab_size, hidden_size=hidden_size, input_size=input_size)
    if preset is not None:
        return dataclasses.replace(preset, input_size=input_size, **fields)
    try:
        return MemoryConfig(
            input_size=input_size,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            family=config.family or "gelu",
            intermediate_size=(
                4 * hidden_size if config.intermediate_size is None else config.intermediate_size
            ),
            num_blocks=4 if config.num_blocks is None else config.num_blocks,
            **fields,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _shape_of(
    initial: InitialMemory, config: Config, inputs: TrainingInputs, input_size: int, vocab_size: int
) -> MemoryConfig:
    """The shape of the memory that the training starts from; the flags may repeat it."""
    source: object = config
    if config.preset is not None:
        source = PRESETS[config.preset](initial.memory.vocab_size)
    required: dict[str, tuple[str, object]] = {
        "input_size": (f"the inputs of --keys {inputs.keys.root} have", input_size),
        "window": ("--window asks for", config.window),
        "vocab_size": ("the base's output head has", vocab_size),
    }
    for name in SHAPE_FLAGS:
        value = getattr(source, name)
        if value is not None:
            flag = flag_name("preset" if config.preset else name)
            required[name] = (f"{flag} asks for", value)
    check_fits(initial, required=required, vocabulary_sha256=inputs.corpus.vocabulary_sha256)
    return initial.memory
