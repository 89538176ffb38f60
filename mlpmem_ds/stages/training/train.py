"""`train`: keys' inputs + targets → a trained memory, under DeepSpeed.

Batches come in an order that depends on the seed alone (formats/training_order.py), so the number of ranks
may change from one start to the next, and a killed run continues from its newest whole checkpoint. Where the
keys store no inputs the frozen base computes them during the training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.config import compute_dtype, micro_batches_per_step, resolve_ds_config
from mlpmem_ds.engines.deepspeed.engine import AdamWSettings, Engine, build_engine
from mlpmem_ds.engines.deepspeed.process_group import named_ranks, set_up_distributed
from mlpmem_ds.engines.deepspeed.zero_state import set_parameter
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.hidden_states import StateSource, TransformersSource, state_width
from mlpmem_ds.engines.online_inputs import OnlineInputs
from mlpmem_ds.engines.processes import gather_values
from mlpmem_ds.formats.batches import BatchReader, threads_for
from mlpmem_ds.formats.permuted_targets import PermutedTargets
from mlpmem_ds.formats.trained_models import MemoryManifest, MemorySubject, TrainingResult, take_weights
from mlpmem_ds.formats.training_order import TrainingOrder
from mlpmem_ds.formats.training_windows import StoredTargets
from mlpmem_ds.formats.weight_shards import WeightFiles
from mlpmem_ds.models.activations import compile_activations, compiled_activation, recompute_activations
from mlpmem_ds.models.base_end import BaseEnd
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.objective import MemoryWithLoss
from mlpmem_ds.stages.training.automatic import settle
from mlpmem_ds.stages.training.base_files import Read
from mlpmem_ds.stages.training.base_start import open_base_start
from mlpmem_ds.stages.training.config import SHAPE_FLAGS, Config
from mlpmem_ds.stages.training.defaults import (
    START_LEARNING_RATE,
    default_learning_rate,
    warn_of_few_rows,
)
from mlpmem_ds.stages.training.frozen_base import open_base
from mlpmem_ds.stages.training.initial_memory import InitialMemory, hash_initial_memory
from mlpmem_ds.stages.training.inputs import (
    TrainingInputs,
    check_loader,
    check_log_probabilities,
    open_inputs,
    provenance_of,
    verify_files,
)
from mlpmem_ds.stages.training.joined import open_base_end
from mlpmem_ds.stages.training.known_text import warn_of_known_text
from mlpmem_ds.stages.training.lent_head import check_initial_head, lender_of
from mlpmem_ds.stages.training.memory_shape import memory_shape
from mlpmem_ds.stages.training.memory_validation import MemoryValidator
from mlpmem_ds.stages.training.objectives import OBJECTIVES, MemoryObjective
from mlpmem_ds.stages.training.parts import Batches, Steps
from mlpmem_ds.stages.training.training import Training, announce, is_complete

__all__ = ["Config", "run"]
_logger = logging.getLogger(__name__)
_VALIDATIONS_A_RUN = 5


def run(config: Config, world: World) -> None:
    """Train, or continue, or say that it is complete; formats/README.md says what is written."""
    # What a rank can refuse alone.
    inputs = open_inputs(config, world)
    config, inputs = settle(config, inputs, world)
    ds_config = resolve_ds_config(
        config.ds_config,
        batch=config.batch_positions,
        batch_flag="--batch-positions",
        world_size=world.size,
        max_micro_batch=config.micro_batch_positions,
        gradient_clipping=config.gradient_clipping,
    )
    check_loader(config, inputs, world)
    steps = _steps(config, inputs)

    # From here on the ranks work together; nothing is written yet.
    set_up_distributed(world, rank_timeout_seconds=config.rank_timeout_seconds)
    with named_ranks():
        _run_together(config, inputs, ds_config, steps, world)


def _run_together(
    config: Config, inputs: TrainingInputs, ds_config: dict[str, Any], steps: Steps, world: World
) -> None:
    if inputs.initial is not None:
        inputs = replace(inputs, initial_sha256=hash_initial_memory(inputs.initial, world))
    base = open_base(config, inputs, world)
    if inputs.initial is not None:
        check_initial_head(inputs.initial, config.model)
    start = open_base_start(config, inputs)
    input_size = inputs.keys.input_size * inputs.window
    if base is not None and inputs.is_online:
        input_size = state_width(base, inputs.point)
    memory = memory_shape(config, inputs, input_size, start)
    starts = {} if start is None else start.parameters(memory)
    objective = OBJECTIVES[config.objective](config, memory)
    if objective.needs_base_log_probabilities:
        check_log_probabilities(config, inputs.keys)
    base_end = open_base_end(config, inputs) if objective.needs_base_end else None
    if config.compile:
        _require_compiler(memory.family, world)
    if config.learning_rate is None:
        rate = default_learning_rate(memory.num_parameters() + memory.num_shared_parameters())
        if config.start == "base":
            rate = min(rate, START_LEARNING_RATE)
        config = replace(config, learning_rate=rate)

    directory = _open_directory(config, inputs, memory, ds_config, steps, world)
    if is_complete(directory, config):
        return
    verify_files(directory, inputs, with_log_probabilities=objective.needs_base_log_probabilities)
    training = _build(
        config,
        inputs,
        ds_config,
        steps,
        directory,
        objective=objective,
        memory=memory,
        base=base,
        starts=starts,
        base_end=base_end,
    )
    del base, base_end  # the training holds the base only where it computes the inputs
    training.run()


def _steps(config: Config, inputs: TrainingInputs) -> Steps:
    if config.control == "random-memory":
        return Steps(count=0, rows=config.batch_positions)
    num_steps = int(config.epochs * inputs.keys.num_positions) // config.batch_positions
    if num_steps < 1:
        raise UserError(
            f"--epochs {config.epochs:g} of {inputs.keys.num_positions:,} positions do not fill one batch of "
            f"--batch-positions {config.batch_positions:,}: choose a smaller batch or more epochs"
        )
    every = config.validate_every
    if every == "auto":
        every = max(1, num_steps // _VALIDATIONS_A_RUN)
    elif every == "epoch":
        every = max(1, inputs.keys.num_positions // config.batch_positions)
    return Steps(count=num_steps, rows=config.batch_positions, validate_every=every or 0)


def _open_directory(
    config: Config,
    inputs: TrainingInputs,
    memory: MemoryConfig,
    ds_config: Mapping[str, Any],
    steps: Steps,
    world: World,
) -> StageDirectory:
    hashes = dict(inputs.hashes)
    if inputs.model_sha256 is not None and config.start_of_head == "base":
        hashes["head"] = inputs.model_sha256
    shape = memory.to_dict()
    return open_stage(
        config.output,
        stage=MemoryManifest.FORMAT,
        version=MemoryManifest.VERSION,
        config=config,
        inputs=hashes,
        world=world,
        resolved={
            "ds_config": str(compute_dtype(ds_config)),  # of the file's settings this alone is in the numbers
            **{name: shape[name] for name in SHAPE_FLAGS},
        },
    )


def _build(
    config: Config,
    inputs: TrainingInputs,
    ds_config: Mapping[str, Any],
    steps: Steps,
    directory: StageDirectory,
    *,
    objective: MemoryObjective,
    memory: MemoryConfig,
    base: TransformersSource | None,
    starts: Mapping[str, Read],
    base_end: BaseEnd | None,
) -> Training:
    world = directory.world
    announce(
        directory,
        config,
        ds_config,
        num_parameters=memory.num_parameters(),
        num_shared=memory.num_shared_parameters(),
        steps=steps,
        rows=objective.rows,
    )
    if world.is_first:
        if inputs.is_online:
            _logger.info("the keys store no inputs, the base computes them")
        warn_of_few_rows(
            config.batch_positions, world, flag="--batch-positions", on_gpu=torch.cuda.is_available()
        )
    engine = build_engine(
        objective.make_module,
        config=ds_config,
        settings=AdamWSettings(weight_decay=config.weight_decay),
        seed=config.seed,
        world=world,
        prepare=partial(_prepare, config=config, initial=inputs.initial, starts=starts, world=world),
    )
    _give_base(engine, config, memory, base if inputs.is_online else None, base_end)
    subject = MemorySubject(
        memory=memory.to_dict(), provenance=provenance_of(config, inputs, memory, num_steps=steps.count)
    )
    return Training(
        engine=engine,
        objective=objective,
        batches=_batches(config, inputs, objective, base, world, micro_batches_per_step(ds_config)),
        validator=_validator(config, inputs, base, world),
        options=config,
        steps=steps,
        directory=directory,
        subject=to_json(subject),
        describe=partial(_describe, subject=subject),
        write=partial(_write, subject=subject, memory=memory),
    )


def _give_base(
    engine: Engine,
    config: Config,
    memory: MemoryConfig,
    running: TransformersSource | None,
    base_end: BaseEnd | None,
) -> None:
    """Give the module what it takes of the base: its end for the objective, its head for the memory."""
    module = engine.module
    assert isinstance(module, MemoryWithLoss)
    if base_end is not None:
        module.base_end = base_end.to(engine.device, engine.dtype)
    if memory.shared_head is not None:
        assert config.model is not None
        module.lend_head(
            lender_of(
                config.model,
                device=engine.device,
                dtype=engine.dtype,
                running=running,
                base_end=module.base_end,
            )
        )


def _prepare(
    model: nn.Module,
    *,
    config: Config,
    initial: InitialMemory | None,
    starts: Mapping[str, Read],
    world: World,
) -> None:
    """Give the module the weights that the training starts from, and say how it computes."""
    if initial is not None:
        for name, parameter in model.named_parameters():
            set_parameter(parameter, partial(initial.tensor, name), world)
    for name, read in starts.items():
        set_parameter(model.get_parameter(name), read, world)
    assert isinstance(model, MemoryWithLoss)
    recompute_activations(model, config.recompute_activations)
    if config.compile:
        compile_activations(model)


def _batches(
    config: Config,
    inputs: TrainingInputs,
    objective: MemoryObjective,
    base: StateSource | None,
    world: World,
    num_micro_batches: int,
) -> Batches:
    online = None
    if inputs.is_online:
        assert base is not None
        online = OnlineInputs(base, inputs.corpus, inputs.point)
    if config.loader == "webdataset":
        from mlpmem_ds.stages.training.streamed_batches import StreamedBatches, StreamSettings

        assert inputs.targets is not None
        return StreamedBatches(
            inputs.stored_keys,
            inputs.targets,
            StreamSettings(
                place=config.targets_url or str(config.targets),
                open_shards=config.open_shards,
                buffer_positions=config.shuffle_buffer_positions,
                seed=config.seed,
            ),
            batch_positions=config.batch_positions,
            world=world,
            num_micro_batches=num_micro_batches,
            with_log_probabilities=objective.needs_base_log_probabilities,
            inputs=online,
        )
    targets: StoredTargets | None = inputs.targets if objective.needs_targets else None
    if inputs.targets is not None and config.control == "permuted-targets":
        targets = PermutedTargets(inputs.targets, config.seed)
    return BatchReader(
        inputs.stored_keys,
        targets,
        TrainingOrder(
            num_positions=inputs.keys.num_positions,
            block_size=inputs.keys.manifest.block_size,
            window_blocks=config.shuffle_window_blocks,
            seed=config.seed,
            by_block=config.order == "blocks" or inputs.is_online,
        ),
        batch_positions=config.batch_positions,
        rank=world.rank,
        size=world.size,
        num_micro_batches=num_micro_batches,
        with_log_probabilities=objective.needs_base_log_probabilities,
        inputs=online,
        threads=config.reader_threads
        or threads_for(min(world.size, torch.cuda.device_count() or world.size)),
    )


def _validator(
    config: Config, inputs: TrainingInputs, base: StateSource | None, world: World
) -> MemoryValidator | None:
    if inputs.tuning is None or config.control == "random-memory":
        return None
    assert base is not None
    validator = MemoryValidator(
        base, inputs.tuning, inputs.point, positions=config.validation_positions, world=world
    )
    if config.start == "base":
        perplexity = validator.base_perplexity()
        if world.is_first:
            warn_of_known_text(inputs.keys, perplexity)
    return validator


def _describe(result: TrainingResult, *, subject: MemorySubject) -> MemoryManifest:
    return MemoryManifest(memory=subject.memory, provenance=subject.provenance, training=result)


def _write(
    writer: UnitWriter, files: WeightFiles, *, subject: MemorySubject, memory: MemoryConfig
) -> dict[str, Any]:
    take_weights(writer, files, memory=subject.memory, provenance=subject.provenance)
    shared = memory.num_shared_parameters()
    return {"parameters": memory.num_parameters(), **({"parameters_of_base": shared} if shared else {})}


def _require_compiler(family: str, world: World) -> None:
    """Raises UserError on all ranks where one of them has no compiler."""
    reason = ""
    try:
        compiled_activation(family, device_of_rank("auto", world))
    except Exception as error:  # each of the compilers under torch.compile raises its own kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    for rank, said in enumerate(gather_values(reason, world)):
        if said:
            raise UserError(
                f"--compile: torch.compile does not work on rank {rank} ({said}): install a C++ compiler (on"
                " a GPU Triton), or leave --compile out"
            )
