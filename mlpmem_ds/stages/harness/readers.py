"""Part of `run_lm_eval`: who reads a suite's tasks: base and memory, the base with passages, controls."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.model_files import NO_LIMIT, max_context_of_model
from mlpmem_ds.engines.tokenizer import TextEncoder, open_encoder
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer
from mlpmem_ds.models.mixture import Constant, Grid
from mlpmem_ds.stages.generation.exported_model import Source, open_source
from mlpmem_ds.stages.harness.config import Config
from mlpmem_ds.stages.harness.grid_scores import GATE_NAME, Weighting
from mlpmem_ds.stages.questions.answering import Answerer
from mlpmem_ds.stages.questions.arms import (
    BASE,
    MEMORY,
    Reader,
    hash_models,
    is_export,
    list_others,
    load_plain,
    ready_answerer,
)
from mlpmem_ds.stages.questions.lengths import ContextLimit
from mlpmem_ds.stages.shared_flags import device_map_of, grid_of

_logger = logging.getLogger(__name__)
JOINT = "joint"
ALONE, GATE = "memory_alone", f"{MEMORY}+gate"
_LIKELIHOOD_GRID, _GENERATION_GRID = ("0:1:0.05",), ("0:1:0.25",)


def list_readers(config: Config) -> list[Reader]:
    """Those that the flags name; base and memory, which are read together, first."""
    main: dict[str, Any] = {"model": config.model, "flag": "--model"}
    joint = Reader(name=JOINT, description="base and memory, at each λ", **main)
    return [joint, *list_others(config, Reader, main)]


def describe_arms(readers: list[Reader], names: Sequence[str]) -> dict[str, str]:
    """Name of an arm → what it is.

    Args:
        readers: all of them.
        names: of the weightings at which base and memory were scored.
    """
    arms = {BASE: "the base alone, λ = 0"}
    if len(names) > 1:
        arms[MEMORY] = "base and memory, λ chosen on the tuning half"
        arms[ALONE] = "the memory alone, λ = 1: the base is switched off"
    if GATE_NAME in names:
        arms[GATE] = "base and memory, by the model's own gate"
    return arms | {reader.name: reader.description for reader in readers if reader.name != JOINT}


class Models:
    """The models of the readers, loaded when they are asked, one at a time.

    Args:
        config: the flags.
        device: of this rank.

    Raises:
        UserError: --model is neither a model nor a base with memories; or it has no memory, and a flag is
            about that.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device
        self._source: Source | None = None
        if config.memory or is_export(config.model):
            is_weighed = not config.memory or config.gate is not None
            self._source = open_source(config, lmbda=None if is_weighed else 0.5)  # another is set each time
        elif given := config.given("lambdas", "generation_lambdas", "base_only_threshold"):
            raise UserError(
                f"{given[0]}: --model {config.model} is not there or has no memory: give the output of"
                " tools/convert_checkpoint.py, add --memory, or leave the flag out"
            )
        self._load = functools.lru_cache(maxsize=1)(self._load_model)

    def hashes(self, readers: list[Reader]) -> dict[str, str]:
        """Name of an input → SHA-256, of each model once. Raises UserError for what is no model."""
        found = hash_models(readers)
        if self._source is not None and self._source.parts is not None:
            parts = self._source.parts
            memories = [memory.sha256 for memory in parts.memories]
            found |= {f"memory-{number}": value for number, value in enumerate(memories)}
            if parts.gate is not None:
                found["gate"] = parts.gate.sha256
        return found

    def context_limit(self, reader: Reader) -> ContextLimit:
        """How the reader's model reads, without its weights."""
        if reader.flag == "--model" and self._source is not None:
            tokenizer, context = self._source.tokenizer, self._source.context or NO_LIMIT
        else:
            tokenizer = load_tokenizer(reader.model, flag=reader.flag)
            context = max_context_of_model(reader.model)
        encoder = open_encoder(
            tokenizer,
            label=f"the tokenizer of {reader.flag}",
            special_tokens=self._config.special_tokens,
        )
        return ContextLimit(flag=reader.flag, encoder=encoder, context=context)

    def of(self, reader: Reader, *, begin_tokens: bool) -> Answerer:
        """The reader's model, ready to answer prompts with the tokenizer's begin tokens, or without them."""
        model, encoder = self._load(reader.model, reader.flag)
        if not begin_tokens:
            encoder = replace(encoder, begin_ids=())
        return ready_answerer(model, encoder, base_alone=reader.with_passages)

    def weighting(self, reader: Reader, *, generates: bool) -> Weighting:
        """The weights at which this reader's answers are scored; 0 and 1 are always among them.

        The model is loaded where its own gate has to be known.
        """
        if reader.name != JOINT or self._source is None:
            return Weighting()
        config = self._config
        words = config.generation_lambdas or config.lambdas if generates else config.lambdas
        grid = grid_of(words or (_GENERATION_GRID if generates else _LIKELIHOOD_GRID))
        gate = self._own_gate(reader)
        lambdas = Grid(tuple(sorted({0.0, *grid.lambdas, 1.0}))).lambdas
        return Weighting(lambdas=lambdas, gate=None if isinstance(gate, Constant) else gate)

    def _own_gate(self, reader: Reader) -> Any:
        self._load(reader.model, reader.flag)
        return self._gate

    def _load_model(self, place: str, flag: str) -> tuple[Any, TextEncoder]:
        config, device_map = self._config, device_map_of(self._config.device_map)
        if flag != "--model" or self._source is None:
            return load_plain(
                place, flag, config.dtype, config.special_tokens, self._device, device_map=device_map
            )
        model = self._source.load(device=self._device, dtype=config.dtype, device_map=device_map)
        self._gate = model.gate
        if config.base_only_threshold is not None and isinstance(model.gate, Constant):
            _logger.warning(
                "--base-only-threshold %g changes nothing: there is no gate (--gate), and every λ of a suite"
                " is meant without it",
                config.base_only_threshold,
            )
        encoder = open_encoder(
            self._source.tokenizer, label="the tokenizer of --model", special_tokens=config.special_tokens
        )
        return model, encoder
