"""Fifth stage: keys' inputs + targets → a trained memory, under DeepSpeed.

    loss = alpha KL(kNN || memory) + (1 - alpha) CE

Batches come in an order that depends on the seed alone (formats/batches.py), so the number of ranks may
change from one start to the next, and a killed run continues from its newest whole checkpoint. Where the keys
store no inputs the frozen base computes them beside the training.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed import resolve_ds_config, set_up_distributed
from mlpmem_ds.engines.ds_config import compute_dtype, zero_stage
from mlpmem_ds.engines.hidden_states import resolve_device
from mlpmem_ds.engines.processes import gather_values
from mlpmem_ds.formats.checkpoint import MEMORY_STAGE, MEMORY_VERSION
from mlpmem_ds.models.memory import compiled_activation
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.defaults import default_learning_rate, warn_of_few_rows
from mlpmem_ds.stages.training.inputs import base_head, open_inputs
from mlpmem_ds.stages.training.memory_training import UNIT, MemoryTraining

__all__ = ["Config", "run"]
_logger = logging.getLogger(__name__)


def run(config: Config, world: World) -> None:
    """Train, or continue, or say that it is complete; see formats/README.md for what is written."""
    inputs = open_inputs(config, world)
    ds_config = resolve_ds_config(
        config.ds_config,
        batch=config.batch_positions,
        batch_flag="--batch-positions",
        world_size=world.size,
        max_micro_batch=config.micro_batch_positions,
        gradient_clipping=config.gradient_clipping,
    )
    num_steps = int(config.epochs * inputs.keys.num_positions) // config.batch_positions
    if num_steps < 1:
        raise UserError(
            f"--epochs {config.epochs:g} of {inputs.keys.num_positions:,} positions do not fill one batch of "
            f"--batch-positions {config.batch_positions:,}: choose a smaller batch or more epochs"
        )
    if config.compile:
        set_up_distributed(world)
        _require_compiler(inputs.memory.family, world)
    head = base_head(config, inputs)
    if config.learning_rate is None:
        config = replace(config, learning_rate=default_learning_rate(inputs.memory.num_parameters()))
    directory = open_stage(
        config.output,
        stage=MEMORY_STAGE,
        version=MEMORY_VERSION,
        config=config,
        inputs=inputs.hashes,
        world=world,
        extra={
            **inputs.memory.to_dict(),
            "dtype": str(compute_dtype(ds_config)),
            "num_steps": num_steps,
            **(
                {}
                if inputs.model_sha256 is None or config.head == "random"
                else {"head_of": inputs.model_sha256}
            ),
        },
    )
    if directory.manifest_path.is_file() and directory.fault_of_unit(UNIT) is None:
        if config.resume == "never" and world.is_first:
            _logger.warning(
                "--resume never: %s is complete and nothing was done; remove it or choose another --output to"
                " train anew",
                config.output,
            )
        _logger.info("complete: %s (%d steps)", config.output, num_steps)
        return
    if world.is_first:
        publish_json(config.output / "ds_config.json", ds_config)
        _logger.info(
            "%s parameters, %d steps of %d positions, learning rate %g, ZeRO stage %d on %d ranks%s",
            f"{inputs.memory.num_parameters():,}",
            num_steps,
            config.batch_positions,
            config.learning_rate,
            zero_stage(ds_config),
            world.size,
            "; the keys store no inputs, the base computes them" if inputs.is_online else "",
        )
        warn_of_few_rows(
            config.batch_positions, world, flag="--batch-positions", on_gpu=torch.cuda.is_available()
        )
    set_up_distributed(world)
    training = MemoryTraining(config, inputs, ds_config, num_steps, head, directory)
    del inputs, head  # with them goes the base, where the training needs it no more
    training.run()


def _require_compiler(family: str, world: World) -> None:
    """Raises UserError on all ranks where one of them has no compiler."""
    reason = ""
    try:
        compiled_activation(family, resolve_device("auto", world.local_rank))
    except Exception as error:  # each of the compilers under torch.compile raises its own kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    for rank, said in enumerate(gather_values(reason, world)):
        if said:
            raise UserError(
                f"--compile: torch.compile does not work on rank {rank} ({said}): install a C++ compiler (on"
                " a GPU Triton), or leave --compile out"
            )
