"""Part of `answer_questions`: who answers: the base, base and memory, controls, the base with passages."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json_object
from mlpmem_ds.engines.hidden_states import DTYPES, resolve_dtype
from mlpmem_ds.engines.model_files import (
    fingerprint_model,
    max_context_of,
    max_context_of_model,
    model_file,
)
from mlpmem_ds.engines.tokenizer import TextEncoder, open_encoder
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer
from mlpmem_ds.formats.corpus import SpecialTokens
from mlpmem_ds.formats.model_directory import fault_of
from mlpmem_ds.models.base_loading import load_base
from mlpmem_ds.models.generation_settings import complete_settings, token_settings
from mlpmem_ds.models.mixture import StoredGate
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.stages.generation.exported_model import load_model, read_export
from mlpmem_ds.stages.questions.answering import Answerer
from mlpmem_ds.stages.questions.config import Config, control_models
from mlpmem_ds.stages.questions.lengths import ContextLimit
from mlpmem_ds.stages.shared_flags import grid_of

BASE, MEMORY, RAG = "base", "base+memory", "base+rag"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model that answers questions."""

    name: str
    description: str
    model: str
    """as the user named it"""
    flag: str
    with_passages: bool = False


@dataclass(frozen=True, kw_only=True)
class Arm(Reader):
    """One way to answer."""

    part: str = "whole"
    """of an export: `base` alone, or the `whole`"""
    gate: StoredGate | None = None
    """of base and memory, without a threshold; None = the export's own, with its threshold"""


ReaderT = TypeVar("ReaderT", bound=Reader)


class NamesOthers(Protocol):
    """Flags that name who is asked besides base and memory."""

    @property
    def passages(self) -> Path | None: ...

    @property
    def num_passages(self) -> int: ...

    @property
    def control(self) -> tuple[str, ...]: ...


def list_arms(config: Config) -> list[Arm]:
    """The arms that the flags name, the base first. Raises UserError for --lambdas without a memory."""
    has_memory = is_export(config.model)
    if config.lambdas and not has_memory:
        raise UserError(
            f"--lambdas: --model {config.model} is not there or has no memory: give the output of"
            " tools/convert_checkpoint.py, or leave the flag out"
        )
    model: dict[str, Any] = {"model": config.model, "flag": "--model"}
    base: dict[str, Any] = {**model, "part": "base" if has_memory else "whole"}
    arms = [Arm(name=BASE, description="the base alone", **base)]
    if has_memory and not config.lambdas:
        arms.append(Arm(name=MEMORY, description="base and memory, by the export's own gate", **model))
    for gate in grid_of(config.lambdas) if config.lambdas else ():
        name = f"{MEMORY}_{gate.lmbda:g}"
        arms.append(Arm(name=name, description=f"base and memory, {gate}", gate=gate, **model))
    return arms + list_others(config, Arm, base)


def list_others(config: NamesOthers, make: type[ReaderT], base: Mapping[str, Any]) -> list[ReaderT]:
    """The base with passages, and the models of --control; `base` are the fields of the base's own."""
    others = []
    if config.passages is not None:
        description = f"the base with {config.num_passages} passages before an open question"
        others.append(make(name=RAG, description=description, with_passages=True, **base))
    for name, place in control_models(config.control).items():
        description = "another language model in place of the base"
        others.append(make(name=name, description=description, model=place, flag=f"--control {name}"))
    return others


def is_export(model: str) -> bool:
    """Whether it holds a memory and its base."""
    path = model_file(model, "config.json")
    return path is not None and read_json_object(path).get("model_type") == "mlpmem"


def hash_models(arms: Sequence[Reader]) -> dict[str, str]:
    """Name of an input → SHA-256, of each model once. Raises UserError for what is no model."""
    return {_input_of(flag): fingerprint_model(model, flag=flag) for model, flag in _flags_of(arms).items()}


def hash_tokenizers(limits: Sequence[ContextLimit]) -> dict[str, str]:
    """The same of the models' tokenizers: a model's own hash is of its weights."""
    return {f"tokenizer-{_input_of(limit.flag)}": limit.encoder.documents_sha256 for limit in limits}


def _input_of(flag: str) -> str:
    return flag.removeprefix("--").replace(" ", "-")


def _flags_of(arms: Sequence[Reader]) -> dict[str, str]:
    """Model → the first flag that names it."""
    flags: dict[str, str] = {}
    for arm in arms:
        flags.setdefault(arm.model, arm.flag)
    return flags


class Answerers:
    """Models that are loaded when they are asked, one model at a time.

    Args:
        config: the flags.
        device: of this rank.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self.device = config, device
        self._load = functools.lru_cache(maxsize=1)(self._load_model)

    def of(self, arm: Arm) -> Answerer:
        """The arm's model, ready to answer."""
        model, encoder = self._load(arm.model, arm.flag)
        base_alone = arm.part == "base"
        if hasattr(model, "set_gate") and not base_alone:
            is_own = arm.gate is None
            model.set_gate(self._own_gate if is_own else arm.gate)
            model.base_only_threshold = self._own_threshold if is_own else None
        return ready_answerer(model, encoder, base_alone=base_alone)

    def context_limits(self, arms: Sequence[Arm]) -> list[ContextLimit]:
        """How the arms' models read, without their weights, of each model once."""
        return [self._context_limit(model, flag) for model, flag in _flags_of(arms).items()]

    def _context_limit(self, place: str, flag: str) -> ContextLimit:
        if is_export(place):
            settings, tokenizer = read_export(place)
            context = max_context_of(settings)
        else:
            tokenizer, context = load_tokenizer(place, flag=flag), max_context_of_model(place)
        encoder = open_encoder(
            tokenizer, label=f"the tokenizer of {flag}", special_tokens=self._config.special_tokens
        )
        return ContextLimit(flag=flag, encoder=encoder, context=context)

    def _load_model(self, place: str, flag: str) -> tuple[Any, TextEncoder]:
        config = self._config
        if not is_export(place):
            return load_plain(place, flag, config.dtype, config.special_tokens, self.device)
        _, tokenizer = read_export(place)
        model = load_model(place, device=self.device, dtype=config.dtype)
        self._own_gate, self._own_threshold = model.gate, model.base_only_threshold
        return model, open_encoder(
            tokenizer, label=f"the tokenizer of {flag}", special_tokens=config.special_tokens
        )


def load_plain(
    place: str,
    flag: str,
    dtype: str,
    special_tokens: SpecialTokens,
    device: torch.device,
    *,
    device_map: str | None = None,
) -> tuple[Any, TextEncoder]:
    """A language model without a memory, on the device or spread over several by `device_map`, and its
    encoder.

    Raises:
        UserError: there is none of that name.
    """
    tokenizer = load_tokenizer(place, flag=flag)
    try:
        weights_dtype = DTYPES[resolve_dtype(dtype, device)]
        model = load_base(place, dtype=weights_dtype, device=device, device_map=device_map)
    except ValueError as error:
        raise UserError(f"{flag} {place}: {fault_of(place, error)}") from error
    return model, open_encoder(tokenizer, label=f"the tokenizer of {flag}", special_tokens=special_tokens)


def ready_answerer(model: Any, encoder: TextEncoder, *, base_alone: bool = False) -> Answerer:
    """A loaded model, or base and memory in one, with all that its answers need.

    Args:
        base_alone: of base and memory only the base answers. It stops where both do: in an export only
            the joint model has the settings of generation, the base's own are made from its config.json.
    """
    base = model.base if hasattr(model, "set_gate") else model
    complete = complete_settings(
        model.generation_config,
        base=base,
        tokenizer=encoder.tokenizer,
        num_rows=len(output_head(base)[0]),
    )
    return Answerer(
        model=base if base_alone else model,
        encoder=encoder,
        tokens=token_settings(complete),
        context=max_context_of(base.config),
    )
