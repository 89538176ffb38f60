"""Part of `extract_keys`: its flags, and the models and the corpus that it reads, checked before anything is
written.

D width of a model.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mlpmem_ds.core.config import option, require_at_least
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import (
    StateSource,
    TransformersSource,
    check_source_reads,
    fingerprint_model,
    resolve_point,
    vocabulary_of_model,
)
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.models.backbone import CapturePoint
from mlpmem_ds.stages.keys.codec import check_log_probabilities, checked

_logger = logging.getLogger(__name__)
_MAX_EXACT_DIM = 1040  # above it a product of int8 codes may pass 2^24 and is no longer exact in float32
_TRIED_TOKENS = 8


Point = Literal["ffn_input", "layer_output", "final_norm"]


def layer_number(text: str) -> int | float:
    """`-1` is an index, `0.7` a fraction of the depth."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        remedy = "give an index such as -1, or a fraction of the depth such as 0.7"
        raise argparse.ArgumentTypeError(f"{text!r} is no layer: {remedy}") from error


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which states are kept, and how."""

    model: str = option("language model of the keys: a directory or Hub name", identity="none")
    input_model: str | None = option(
        "base of the memory, with the same tokenizer: gives its inputs and the log-probabilities; left out ="
        " --model",
        None,
        identity="none",
    )
    corpus: Path = option("corpus directory")
    output: Path = option("key directory to write")
    split: str = option("split of the corpus", "train")
    key_layer: int | float = option(
        "layer of the keys: an index, or a fraction of the depth such as 0.7",
        -1,
        parse=layer_number,
        metavar="LAYER",
        identity="none",
    )
    key_point: Point = option("where in the layer the key is read", "ffn_input")
    input_layer: int | float = option(
        "layer of the memory's inputs", -1, parse=layer_number, metavar="LAYER", identity="none"
    )
    input_point: Point | None = option(
        "where in the layer the memory's input is read; left out = as --key-point", None, identity="none"
    )
    layers_path: str | None = option(
        "dotted path to --model's list of decoder layers, where it is not found by itself",
        None,
        identity="none",
    )
    input_layers_path: str | None = option("the same for --input-model", None, identity="none")
    codec: Literal["int8", "raw"] = option("int8 codes of the rotated key, or the raw key", "int8")
    dim: int = option("numbers in an int8 key; 0 = the width of the model, at most 256", 0, identity="none")
    raw_dtype: Literal["float16", "bfloat16"] = option("of raw keys", "float16", identity="none")
    input_codec: Literal["bf16", "int8", "none"] = option(
        "the memory's inputs: 2 bytes a number, 1 byte a number and 4 for 128, or not stored (online"
        " training)",
        "bf16",
    )
    fit_positions: int = option("positions of the sample that fits the int8 codec", 16384)
    unit_positions: int = option("positions in a unit of work", 65536)
    batch_windows: int = option("windows that the base reads at once", 16, identity="none")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "of the base's forward pass; auto = bfloat16 on a GPU, float32 on a CPU", "auto", identity="none"
    )
    device: str = option("auto, cpu, cuda or cuda:N", "auto", identity="none")
    device_map: Literal["none", "auto", "balanced", "balanced_low_0", "sequential"] = option(
        "spread a base that does not fit one GPU over all that this process sees (then start one rank a"
        " machine)",
        "none",
        identity="none",
    )
    attention: str = option("attention implementation: sdpa, eager or flash_attention_2", "sdpa")
    seed: int = option("seed of the int8 codec's sample and rotation, and of the audit's samples", 0)
    audit: int = option(
        "afterwards one rank compares the targets of so many stored keys with those of the raw keys (killed,"
        " it starts anew); 0 = no audit, 2000 is enough",
        0,
        identity="none",
    )
    audit_dims: tuple[int, ...] = option(
        "other sizes of int8 keys to measure in the audit", (), identity="none"
    )
    audit_candidates: int = option(
        "positions that the audit searches at most, which bounds its time; the model reads them again",
        1 << 20,
        identity="none",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, ("fit_positions", "unit_positions", "batch_windows", "audit_candidates"))
        for dim in (self.dim, *self.audit_dims):
            if not 0 <= dim <= _MAX_EXACT_DIM or (dim == 0 and dim in self.audit_dims):
                flag = "--audit-dims" if dim in self.audit_dims else "--dim"
                raise UserError(
                    f"{flag} {dim}: int8 keys have 1 to {_MAX_EXACT_DIM} numbers (more would not be exact)"
                )
        if self.audit < 0:
            raise UserError(f"--audit must be 0 or more queries, not {self.audit}")
        if self.audit_dims and not self.audit:
            raise UserError("--audit-dims says what an audit measures: give --audit 2000 too")
        if self.audit and self.audit_candidates < 2 * self.audit:
            raise UserError(
                f"--audit-candidates {self.audit_candidates} are too few for --audit {self.audit} queries: "
                f"give at least {2 * self.audit}"
            )
        if self.input_layers_path is not None and self.input_model is None:
            raise UserError("--input-layers-path is for --input-model: give --layers-path for --model")


@dataclass(frozen=True, kw_only=True)
class Bases:
    """The models that read the corpus: that of the keys, and that of the memory's inputs; often they are
    one."""

    key_source: StateSource
    key_point: CapturePoint
    input_source: StateSource
    input_point: CapturePoint

    @property
    def is_one(self) -> bool:
        return self.key_source is self.input_source


@dataclass(frozen=True, kw_only=True)
class ExtractionInputs:
    """Everything that the keys are made from. `hashes`: name → SHA-256; `dim`: numbers in a stored key."""

    corpus: CorpusSplit
    bases: Bases
    hashes: dict[str, str]
    dim: int


def open_inputs(config: Config, world: World) -> ExtractionInputs:
    """Open and check the corpus and the models.

    Raises:
        UserError: with what is wrong, and the remedy.
    """
    corpus = open_corpus(config.corpus, config.split)
    if config.unit_positions % corpus.block_size:
        raise UserError(
            f"--unit-positions {config.unit_positions} must be a multiple of the corpus's block size "
            f"{corpus.block_size}"
        )
    hashes = {"corpus": corpus.sha256, **_fingerprints(config)}
    bases = _open_bases(config, corpus, world)
    return ExtractionInputs(
        corpus=corpus, bases=bases, hashes=hashes, dim=_resolve_dim(config, bases.key_source)
    )


def describe_bases(config: Config, bases: Bases) -> dict[str, Any]:
    """What the manifest says of the models and of where they were read."""
    return {
        "key_size": bases.key_source.width,
        "key_layer": bases.key_point.layer,
        "key_point": bases.key_point.point,
        "num_layers": bases.key_source.num_layers,
        "layers_path": config.layers_path,
        "input_codec": config.input_codec,
        "input_size": 0 if config.input_codec == "none" else bases.input_source.width,
        "input_width": bases.input_source.width,
        "input_layer": bases.input_point.layer,
        "input_point": bases.input_point.point,
        "input_num_layers": bases.input_source.num_layers,
        "input_layers_path": config.layers_path if bases.is_one else config.input_layers_path,
        "head_size": bases.input_source.vocab_size,
    }


def _fingerprints(config: Config) -> dict[str, str]:
    """`model`, and `input_model` where it is another; refuses two that have different tokenizers.

    Raises:
        UserError: no such model, or other vocabularies.
    """
    model = fingerprint_model(config.model)
    if config.input_model is None:
        return {"model": model}
    input_model = fingerprint_model(config.input_model, flag="--input-model")
    vocabularies = vocabulary_of_model(config.model), vocabulary_of_model(config.input_model)
    if None not in vocabularies and len(set(vocabularies)) == 2:
        shown = " and ".join(f"{vocabulary[:12]}…" for vocabulary in vocabularies if vocabulary)
        raise UserError(
            f"--model {config.model} and --input-model {config.input_model} have different tokenizers"
            f" (SHA-256 of their vocabularies {shown}): keys and memory inputs must come from models with the"
            " same one"
        )
    return {"model": model, "input_model": input_model}


def _open_bases(config: Config, corpus: CorpusSplit, world: World) -> Bases:
    """Load the models and find the layers that are wanted."""

    def load(name: str, flag: str, layers_path: str | None) -> TransformersSource:
        source = TransformersSource(
            name,
            dtype=config.dtype,
            device=config.device,
            attention=config.attention,
            local_rank=world.local_rank,
            layers_path=layers_path,
            flag=flag,
            device_map=None if config.device_map == "none" else config.device_map,
        )
        check_source_reads(source, corpus, name, flag=flag)
        return source

    key_source = load(config.model, "--model", config.layers_path)
    input_source = key_source
    if config.input_model is not None:
        input_source = load(config.input_model, "--input-model", config.input_layers_path)
    input_point = config.input_point or config.key_point
    bases = Bases(
        key_source=key_source,
        key_point=resolve_point(key_source, config.key_layer, config.key_point, flag="--key-layer"),
        input_source=input_source,
        input_point=resolve_point(input_source, config.input_layer, input_point, flag="--input-layer"),
    )
    _try_reading(bases, corpus)
    return bases


def _try_reading(bases: Bases, corpus: CorpusSplit) -> None:
    """Read a few tokens, so that a point which cannot be read, and NaN weights, are refused before anything
    is written.

    Raises:
        UserError: with what was wrong with it.
    """
    num_positions = min(_TRIED_TOKENS, corpus.num_positions)
    tokens_BS, positions = torch.from_numpy(corpus.tokens(0, num_positions))[None], range(num_positions)
    for name, source, point in (
        ("key", bases.key_source, bases.key_point),
        ("input", bases.input_source, bases.input_point),
    ):
        try:
            batch = source.read(tokens_BS, {name: point})
        except ValueError as error:
            raise UserError(f"--{name}-layer, --{name}-point: {error}") from error
        checked(batch.states[name][0], positions, name, point)
    values_N = torch.from_numpy(corpus.values(0, num_positions))
    check_log_probabilities(bases.input_source.log_probabilities(batch.final_BSD[0], values_N), positions)


def _resolve_dim(config: Config, source: StateSource) -> int:
    for flag, dim in (("--dim", config.dim), *(("--audit-dims", dim) for dim in config.audit_dims)):
        if dim > source.width:
            raise UserError(f"{flag} {dim} is more than the model's width {source.width}")
    if config.codec == "raw":
        if config.dim not in (0, source.width):
            raise UserError(f"--codec raw keeps all {source.width} numbers of a key: leave --dim out")
        return source.width
    if config.raw_dtype != "float16":
        _logger.warning("--raw-dtype is not used without --codec raw")
    return config.dim or min(source.width, 256)
