"""Part of `train`: the frozen base that runs next to the training, whole on each rank or cut over the ranks.

It computes the inputs where the keys store none, and what validations compare the memory with.
"""

from __future__ import annotations

import logging
from typing import Any

from mlpmem_ds.core.once import shared_place
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.attention import attention_or_auto
from mlpmem_ds.engines.deepspeed.sharded_base import ShardedSource
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.hidden_states import TransformersSource, check_source_reads, resolve_dtype
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.inputs import TrainingInputs

_logger = logging.getLogger(__name__)


def open_base(config: Config, inputs: TrainingInputs, world: World) -> TransformersSource | None:
    """The base as `extract_keys` ran it; None where nothing needs it. Collective if it is cut over the ranks.

    Raises:
        UserError: it cannot read the corpus.
    """
    if config.model is None or not inputs.needs_base:
        return None
    manifest = inputs.keys.manifest
    device = device_of_rank("auto", world)
    dtype = resolve_dtype(manifest.dtype or "auto", device)
    # The windows are those of extract_keys, full and without padding, and so is what reads them.
    attention, reason = attention_or_auto(manifest.attention or "auto", device=device, dtype=dtype)
    if reason is not None:
        _logger.warning(
            "the keys were extracted with --attention %s, and the base runs without it here: %s",
            manifest.attention,
            reason.partition(":")[0],
        )
    settings: dict[str, Any] = {
        "dtype": dtype,
        "attention": attention,
        "device": device,
        "layers_path": manifest.input_layers_path,
    }
    source: TransformersSource
    if config.base_sharding == "zero3" and world.size > 1:
        source = sharded = ShardedSource(config.model, **settings)
        _logger.info(
            "the base is cut over %d ranks: this one holds %s of its %s numbers between forwards",
            world.size,
            f"{sharded.numbers_held():,}",
            f"{sharded.numbers():,}",
        )
    else:
        if config.base_sharding == "zero3":
            _logger.warning("--base-sharding zero3 changes nothing on one rank, which holds the whole base")
        source = TransformersSource(config.model, **settings)
    splits = [inputs.corpus] if inputs.tuning is None else [inputs.corpus, inputs.tuning]
    check_source_reads(source, splits, config.model, shared=shared_place(config.output, world))
    return source
