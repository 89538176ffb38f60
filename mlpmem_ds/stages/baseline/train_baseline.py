"""`train_baseline`: what a memory is compared with, a language model trained on the same text by other means.

The trainer, the order of the text, the validation on the tuning split and the limits of steps and time are
those of `train_base`. The result is a model directory that every front-end reads, and a control of `evaluate`
(`--control NAME=DIR`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from mlpmem_ds.core.once import shared_place
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.adapters import LowRankModel
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.trained_models import BaselineManifest, TrainingResult
from mlpmem_ds.formats.weight_shards import WeightFiles
from mlpmem_ds.stages.base.decoder_training import Learner, Text, open_text, steps_of, train_decoder
from mlpmem_ds.stages.base.model import describe_model, fast_attention, load_model, write_model
from mlpmem_ds.stages.baseline.bigger_model import bigger_config, new_model
from mlpmem_ds.stages.baseline.config import CONTINUED_LEARNING_RATE, LORA_LEARNING_RATE, Config, Kind
from mlpmem_ds.stages.baseline.low_rank import rank_for, write_low_rank
from mlpmem_ds.stages.baseline.matched_size import matched_parameters
from mlpmem_ds.stages.training.defaults import default_learning_rate

__all__ = ["Config", "run"]
_logger = logging.getLogger(__name__)
_VALIDATIONS_PER_EPOCH = 4
Write = Callable[[UnitWriter, WeightFiles], Mapping[str, Any]]


def run(config: Config, world: World) -> None:
    """Train, or continue, or say that it is complete; formats/README.md says what is written."""
    text = open_text(config, world)
    steps = steps_of(config, text, validations_per_epoch=_VALIDATIONS_PER_EPOCH)
    matched = matched_parameters(config)
    shared = shared_place(config.output, world)
    inputs = {"model": fingerprint_model(config.model, shared=shared)}
    load = partial(
        load_model, config.model, text.splits, text.length, device_of_rank("auto", world), shared=shared
    )
    make = {"continued": _continued, "lora": _low_rank, "bigger": _bigger}[config.kind]
    config, learner = make(config, text, load, matched)
    if world.is_first:
        _say_size(config, learner, matched)
    train_decoder(config, text, steps, replace(learner, inputs=inputs), world)


def _continued(
    config: Config, text: Text, load: Callable[[], PreTrainedModel], matched: int | None
) -> tuple[Config, Learner]:
    """All weights of the base."""
    model = load()
    write = partial(write_model, model=model, corpus=text.corpus)
    return _with_rate(config, CONTINUED_LEARNING_RATE), _learner(config, model, matched, write)


def _low_rank(
    config: Config, text: Text, load: Callable[[], PreTrainedModel], matched: int | None
) -> tuple[Config, Learner]:
    """Low-rank matrices next to the frozen base's linear layers."""
    model = load()
    rank = config.rank
    if rank is None:
        assert matched is not None
        rank = rank_for(model, matched)
    torch.manual_seed(config.seed)
    low_rank = LowRankModel(model, rank=rank, alpha=config.lora_alpha, name=config.model)
    write = partial(
        write_low_rank,
        reload=load,
        rank=rank,
        alpha=config.lora_alpha,
        name=config.model,
        corpus=text.corpus,
    )
    config = _with_rate(config, LORA_LEARNING_RATE)
    return config, _learner(config, low_rank.model, matched, write, rank=rank)


def _bigger(
    config: Config, text: Text, load: Callable[[], PreTrainedModel], matched: int | None
) -> tuple[Config, Learner]:
    """A fresh model with as many parameters as base and memory together."""
    assert matched is not None
    base = load()  # also checks that it reads this text, as the new one will
    shape = bigger_config(base.config, base.num_parameters() + matched)
    del base
    model = new_model(shape, seed=config.seed, attention=fast_attention())
    write = partial(write_model, model=model, corpus=text.corpus)
    config = _with_rate(config, default_learning_rate(model.num_parameters()))
    return config, _learner(config, model, matched, write)


def _with_rate(config: Config, default: float) -> Config:
    return config if config.learning_rate is not None else replace(config, learning_rate=default)


def _learner(
    config: Config, model: PreTrainedModel, matched: int | None, write: Write, *, rank: int | None = None
) -> Learner:
    """`rank` of low-rank matrices; None where the model's own weights are trained."""
    described = describe_model(model)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = model.num_parameters() - (0 if rank is None else trained)  # merged, it has the base's

    def describe(result: TrainingResult) -> BaselineManifest:
        return BaselineManifest(
            kind=config.kind,
            base=described,
            training=result,
            parameters=total,
            parameters_trained=trained,
            parameters_matched=matched,
            rank=rank,
            alpha=None if rank is None else config.lora_alpha,
        )

    return Learner(
        model=model,
        subject={"kind": config.kind, "base": described, "rank": rank},
        resolved={"match_parameters": matched, "rank": rank},
        manifest=BaselineManifest,
        describe=describe,
        write=write,
    )


def _say_size(config: Config, learner: Learner, matched: int | None) -> None:
    kinds: dict[Kind, str] = {
        "continued": "all weights of the base",
        "lora": f"matrices of rank {learner.resolved['rank']} next to the base's linear layers",
        "bigger": "a new model of the base's family, {layers} layers of width {width}",
    }
    shape = learner.model.config
    said = kinds[config.kind].format(layers=shape.num_hidden_layers, width=shape.hidden_size)
    _logger.info(
        "%s: %s parameters trained%s",
        said,
        f"{learner.num_trained:,}",
        "" if matched is None else f", to compare with a memory of {matched:,}",
    )
