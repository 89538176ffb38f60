"""`train_base`: a small GPT-2-like base from scratch on a corpus, or an existing base trained on.

For `extract_keys`, where no published base fits the corpus, and as a control of `train`: the base trained on
for the same time. After each epoch the tuning split's perplexity decides whether to go on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.once import shared_place
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.config import (
    compute_dtype,
    micro_batches_per_step,
    resolve_ds_config,
    zero_stage,
)
from mlpmem_ds.engines.deepspeed.engine import AdamWSettings, build_engine
from mlpmem_ds.engines.deepspeed.process_group import set_up_distributed
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.formats.trained_models import BaseManifest
from mlpmem_ds.stages.base.batches import SequenceBatches, Sequences
from mlpmem_ds.stages.base.config import Config
from mlpmem_ds.stages.base.model import describe_model, make_model, write_model
from mlpmem_ds.stages.base.objective import NextToken
from mlpmem_ds.stages.base.validation import BaseValidator
from mlpmem_ds.stages.training.defaults import (
    TRAINED_ON_LEARNING_RATE,
    default_learning_rate,
    warn_of_few_rows,
)
from mlpmem_ds.stages.training.parts import Steps
from mlpmem_ds.stages.training.training import Training, announce, is_complete

__all__ = ["Config", "run"]
_logger = logging.getLogger(__name__)


def run(config: Config, world: World) -> None:
    """Train, or continue, or say that it is complete; formats/README.md says what is written."""
    corpus = open_corpus(config.corpus)
    length = config.context or corpus.block_size
    ds_config = _resolve_ds_config(config, length, world)
    batches = SequenceBatches(
        sequences=Sequences(
            tokens=corpus.tokens(0, corpus.num_tokens),
            length=length,
            seed=config.seed,
            begin=corpus.begin_of_document_ids,
        ),
        per_step=_sequences_per_step(config, length),
        num_micro_batches=micro_batches_per_step(ds_config),
        world=world,
    )
    steps = _steps(config, corpus, batches)
    hashes = {"corpus": corpus.sha256}
    if config.init_from is not None:
        hashes["init_from"] = fingerprint_model(
            config.init_from, flag="--init-from", shared=shared_place(config.output, world)
        )
    tuning = _tuning_split(config)
    model = make_model(
        config,
        [corpus] if tuning is None else [corpus, tuning],
        length,
        device_of_rank("auto", world),
        shared=shared_place(config.output, world),
    )
    objective = NextToken(model=model, num_begin_tokens=len(corpus.begin_of_document_ids))
    if config.learning_rate is None:
        rate = default_learning_rate(objective.model.num_parameters())
        config = replace(config, learning_rate=TRAINED_ON_LEARNING_RATE if config.init_from else rate)
    directory = open_stage(
        config.output,
        stage=BaseManifest.FORMAT,
        version=BaseManifest.VERSION,
        config=config,
        inputs=hashes,
        world=world,
        resolved={"context": length, "ds_config": str(compute_dtype(ds_config))},
    )
    if not is_complete(directory, config):
        set_up_distributed(world)
        _build(config, corpus, tuning, ds_config, steps, directory, objective, batches).run()


def _sequences_per_step(config: Config, length: int) -> int:
    return max(config.batch_tokens // length, 1)


def _resolve_ds_config(config: Config, length: int, world: World) -> dict[str, Any]:
    ds_config = resolve_ds_config(
        config.ds_config,
        batch=_sequences_per_step(config, length),
        batch_flag=f"--batch-tokens / {length} =",
        world_size=world.size,
        max_micro_batch=max(config.micro_batch_tokens // length, 1),
        gradient_clipping=config.gradient_clipping,
    )
    if zero_stage(ds_config) not in (1, 2):
        raise UserError(
            f"{config.ds_config} is of ZeRO stage {zero_stage(ds_config)}: bases are trained at stage 1 or 2"
        )
    return ds_config


def _steps(config: Config, corpus: CorpusSplit, batches: SequenceBatches) -> Steps:
    per_epoch, length = batches.steps_per_epoch, batches.sequences.length
    num_steps = int(config.epochs * per_epoch)
    if num_steps < 1:
        raise UserError(
            f"--epochs {config.epochs:g} of the train split's {corpus.num_tokens:,} tokens do not fill one"
            f" batch of {batches.per_step} sequences of {length}: choose a smaller --batch-tokens or"
            " --context, or more epochs"
        )
    every = per_epoch if config.validate_every == "auto" else config.validate_every
    return Steps(
        count=num_steps, rows=batches.per_step * length, per_pass=per_epoch, validate_every=every or 0
    )


def _build(
    config: Config,
    corpus: CorpusSplit,
    tuning: CorpusSplit | None,
    ds_config: Mapping[str, Any],
    steps: Steps,
    directory: StageDirectory,
    objective: NextToken,
    batches: SequenceBatches,
) -> Training:
    world, model = directory.world, objective.model
    described = describe_model(model)
    announce(
        directory,
        config,
        ds_config,
        num_parameters=model.num_parameters(),
        steps=steps,
        rows=objective.rows,
    )
    if world.is_first:
        warn_of_few_rows(steps.rows, world, flag="--batch-tokens", on_gpu=torch.cuda.is_available())
    engine = build_engine(
        objective.make_module,
        config=ds_config,
        settings=AdamWSettings(weight_decay=config.weight_decay),
        seed=config.seed,
        world=world,
    )
    return Training(
        engine=engine,
        objective=objective,
        batches=batches,
        validator=_validator(config, tuning, steps, world),
        options=config,
        steps=steps,
        directory=directory,
        subject={"base": described},
        describe=lambda result: BaseManifest(base=described, training=result),
        write=partial(write_model, model=model, corpus=corpus),
    )


def _tuning_split(config: Config) -> CorpusSplit | None:
    if config.validate_every and num_tokens_of_splits(config.corpus).get("tuning", 0) > 1:
        return open_corpus(config.corpus, "tuning")
    return None


def _validator(
    config: Config, tuning: CorpusSplit | None, steps: Steps, world: World
) -> BaseValidator | None:
    """None where nothing is validated: the training runs to its end, and the last weights are written."""
    if not steps.validate_every:
        return None
    if tuning is not None:
        return BaseValidator(tuning, world)
    if world.is_first:
        _logger.warning(
            "--corpus %s has no tuning split to validate on: no early stopping, and the last weights are"
            " written; prepare it with --tuning-fraction to have both",
            config.corpus,
        )
    return None
