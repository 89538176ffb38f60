"""Part of `train_base` and `train_baseline`: a language model learns the train split of a corpus.

Both open the text, choose a model, and hand it here. After each validation the tuning split's perplexity
decides whether to go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.config import (
    compute_dtype,
    micro_batches_per_step,
    resolve_ds_config,
    zero_stage,
)
from mlpmem_ds.engines.deepspeed.engine import AdamWSettings, build_engine
from mlpmem_ds.engines.deepspeed.process_group import named_ranks, set_up_distributed
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.formats.mapped_tokens import MappedTokens
from mlpmem_ds.formats.trained_models import TrainingResult
from mlpmem_ds.formats.weight_shards import WeightFiles
from mlpmem_ds.stages.base.batches import SequenceBatches, Sequences
from mlpmem_ds.stages.base.objective import NextToken
from mlpmem_ds.stages.base.options import DecoderOptions
from mlpmem_ds.stages.base.validation import BaseValidator
from mlpmem_ds.stages.training.defaults import warn_of_few_rows
from mlpmem_ds.stages.training.metrics import require_wandb
from mlpmem_ds.stages.training.parts import Steps
from mlpmem_ds.stages.training.training import Training, announce, is_complete

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a language model learns, and how it is read."""

    corpus: CorpusSplit
    tuning: CorpusSplit | None
    """None where nothing is validated"""
    length: int
    """tokens of a sequence"""
    ds_config: Mapping[str, Any]
    batches: SequenceBatches

    @property
    def splits(self) -> list[CorpusSplit]:
        return [self.corpus] if self.tuning is None else [self.corpus, self.tuning]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A language model that is to be trained, and what becomes of it."""

    model: PreTrainedModel
    """in float32; what requires no gradient stays as it is, and takes no memory of the optimizer"""
    subject: Mapping[str, Any]
    """what is trained, as plain values: part of every checkpoint"""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """name → SHA-256 of what it was made from, besides the corpus"""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """flag of identity "resolved" → the value that was made of it"""
    manifest: type[Manifest]
    describe: Callable[[TrainingResult], Manifest]
    """the manifest of the result"""
    write: Callable[[UnitWriter, WeightFiles], Mapping[str, Any]]
    """as `Training`'s; the files hold the trained weights alone"""

    @property
    def num_trained(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)


def open_text(config: DecoderOptions, world: World) -> Text:
    """Open the corpus, and cut it into sequences.

    Raises:
        UserError: no corpus there, a batch that does not fit the ranks or the DeepSpeed file, or no wandb.
    """
    if config.wandb_project is not None:
        require_wandb()
    corpus = open_corpus(config.corpus)
    length = config.context or corpus.block_size
    ds_config = _resolve_ds_config(config, length, world)
    return Text(
        corpus=corpus,
        tuning=_tuning_split(config),
        length=length,
        ds_config=ds_config,
        batches=SequenceBatches(
            sequences=Sequences(
                tokens=MappedTokens(corpus),
                length=length,
                seed=config.seed,
                begin=corpus.begin_of_document_ids,
            ),
            per_step=_sequences_per_step(config, length),
            num_micro_batches=micro_batches_per_step(ds_config),
            world=world,
        ),
    )


def steps_of(config: DecoderOptions, text: Text, *, validations_per_epoch: int = 1) -> Steps:
    """How long the training is, and how often it is validated where the flag says `auto`.

    Raises:
        UserError: the flags ask for less than one step.
    """
    per_epoch, batches, length = text.batches.steps_per_epoch, text.batches, text.length
    num_steps = int(config.epochs * per_epoch) if config.steps is None else config.steps
    if min(num_steps, per_epoch) < 1:
        raise UserError(
            f"--epochs {config.epochs:g} of the train split's {text.corpus.num_tokens:,} tokens do not fill"
            f" one batch of {batches.per_step} sequences of {length}: choose a smaller --batch-tokens or"
            " --context, or more epochs"
        )
    every = config.validate_every
    if every == "auto":
        every = max(min(per_epoch, num_steps) // validations_per_epoch, 1)
    elif every == "epoch":
        every = per_epoch
    return Steps(
        count=num_steps, rows=batches.per_step * length, per_pass=per_epoch, validate_every=every or 0
    )


def train_decoder(config: DecoderOptions, text: Text, steps: Steps, learner: Learner, world: World) -> None:
    """Train, or continue, or say that it is complete; formats/README.md says what is written.

    Args:
        config: the flags; the learning rate is a number.
        text: what is learnt.
        steps: how many.
        learner: what is trained.
        world: this rank.
    """
    # Before anything is written: the ranks may not find each other.
    set_up_distributed(world, rank_timeout_seconds=config.rank_timeout_seconds)
    with named_ranks():
        _train_together(config, text, steps, learner, world)


def _train_together(config: DecoderOptions, text: Text, steps: Steps, learner: Learner, world: World) -> None:
    directory = open_stage(
        config.output,
        stage=learner.manifest.FORMAT,
        version=learner.manifest.VERSION,
        config=config,
        inputs={"corpus": text.corpus.sha256, **learner.inputs},
        world=world,
        resolved={
            "context": text.length,
            "ds_config": str(compute_dtype(text.ds_config)),
            **learner.resolved,
        },
    )
    if not is_complete(directory, config):
        for split in text.splits:
            verify_inputs(directory, split, split.stream_files, label=f"text-{split.name}")
        _build(config, text, steps, learner, directory).run()


def _sequences_per_step(config: DecoderOptions, length: int) -> int:
    return max(config.batch_tokens // length, 1)


def _resolve_ds_config(config: DecoderOptions, length: int, world: World) -> dict[str, Any]:
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


def _build(
    config: DecoderOptions, text: Text, steps: Steps, learner: Learner, directory: StageDirectory
) -> Training:
    world, model = directory.world, learner.model
    objective = NextToken(
        model=model,
        num_begin_tokens=len(text.corpus.begin_of_document_ids),
        learnt_share=text.corpus.num_counted / text.corpus.num_positions,
    )
    announce(
        directory,
        config,
        text.ds_config,
        num_parameters=learner.num_trained,
        steps=steps,
        rows=objective.rows,
    )
    if world.is_first:
        warn_of_few_rows(steps.rows, world, flag="--batch-tokens", on_gpu=torch.cuda.is_available())
    engine = build_engine(
        objective.make_module,
        config=text.ds_config,
        settings=AdamWSettings(weight_decay=config.weight_decay),
        seed=config.seed,
        world=world,
        keeps_frozen=False,
    )
    return Training(
        engine=engine,
        objective=objective,
        batches=text.batches,
        validator=_validator(config, text.tuning, steps, world),
        options=config,
        steps=steps,
        directory=directory,
        subject=learner.subject,
        describe=learner.describe,
        write=learner.write,
    )


def _tuning_split(config: DecoderOptions) -> CorpusSplit | None:
    if config.validate_every and num_tokens_of_splits(config.corpus).get("tuning", 0) > 1:
        return open_corpus(config.corpus, "tuning")
    return None


def _validator(
    config: DecoderOptions, tuning: CorpusSplit | None, steps: Steps, world: World
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
