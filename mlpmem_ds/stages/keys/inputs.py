"""Part of `extract_keys`: the models and the corpus that it reads, checked before anything is written.

D width of a model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.once import shared_place
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.hidden_states import (
    StateSource,
    TransformersSource,
    check_source_reads,
    resolve_point,
    state_width,
)
from mlpmem_ds.engines.model_files import fingerprint_model, vocabulary_of_model
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.formats.keys import CodecManifest, KeysManifest, Point
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.stages.keys.codec import check_log_probabilities, checked
from mlpmem_ds.stages.keys.config import Config
from mlpmem_ds.stages.keys.plan import auto_unit_positions
from mlpmem_ds.stages.shared_flags import device_map_of

_logger = logging.getLogger(__name__)
_TRIED_TOKENS = 8


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

    @property
    def key_width(self) -> int:
        """Numbers in a raw key."""
        return state_width(self.key_source, self.key_point)

    @property
    def input_width(self) -> int:
        """Numbers in a memory input."""
        return state_width(self.input_source, self.input_point)

    @property
    def attention(self) -> str:
        """Of the memory's base, which `train` may run again."""
        return self.input_source.attention


@dataclass(frozen=True, kw_only=True)
class ExtractionInputs:
    """Everything that the keys are made from. `hashes`: name → SHA-256; `dim`: numbers in a stored key;
    `unit_positions`: positions of a unit."""

    corpus: CorpusSplit
    bases: Bases
    hashes: dict[str, str]
    dim: int
    unit_positions: int


def open_inputs(config: Config, world: World) -> ExtractionInputs:
    """Open and check the corpus and the models.

    Raises:
        UserError: with what is wrong, and the remedy.
    """
    corpus = open_corpus(config.corpus, config.split)
    if corpus.has_answers and config.audit is not None:
        raise UserError(
            f"--audit compares positions of the whole text, and of --corpus {config.corpus} answers alone are"
            " stored: leave it out"
        )
    unit_positions = config.unit_positions or auto_unit_positions(corpus.num_counted)
    if unit_positions % corpus.block_size:
        raise UserError(
            f"--unit-positions {unit_positions} must be a multiple of the corpus's block size "
            f"{corpus.block_size}"
        )
    hashes = {"corpus": corpus.sha256, **_fingerprints(config, shared_place(config.output, world))}
    bases = _open_bases(config, corpus, world)
    return ExtractionInputs(
        corpus=corpus,
        bases=bases,
        hashes=hashes,
        dim=_resolve_dim(config, bases.key_width),
        unit_positions=unit_positions,
    )


def describe_keys(config: Config, inputs: ExtractionInputs, codec: CodecManifest) -> KeysManifest:
    """The manifest of the keys that these inputs give."""
    corpus, bases = inputs.corpus, inputs.bases
    return KeysManifest(
        codec=codec,
        num_positions=corpus.num_counted,
        unit_positions=inputs.unit_positions,
        split=config.split,
        block_size=corpus.block_size,
        vocab_size=corpus.vocab_size,
        vocabulary_sha256=corpus.vocabulary_sha256,
        key_size=bases.key_width,
        key_layer=bases.key_point.layer,
        key_point=bases.key_point.point,
        num_layers=bases.key_source.num_layers,
        layers_path=config.layers_path,
        input_codec=config.input_codec,
        input_size=0 if config.input_codec == "none" else bases.input_width,
        input_width=bases.input_width,
        input_layer=bases.input_point.layer,
        input_earlier_layers=bases.input_point.earlier,
        input_point=bases.input_point.point,
        input_num_layers=bases.input_source.num_layers,
        input_layers_path=config.layers_path if bases.is_one else config.input_layers_path,
        head_size=bases.input_source.vocab_size,
        dtype=bases.key_source.dtype_name,
        attention=bases.attention,
        begin_of_window_ids=corpus.begin_of_document_ids,
        counts=corpus.manifest.counts,
    )


def _fingerprints(config: Config, shared: Path | None) -> dict[str, str]:
    """`model`, and `input_model` where it is another; refuses two that have different tokenizers.

    Raises:
        UserError: no such model, or other vocabularies.
    """
    model = fingerprint_model(config.model, shared=shared)
    if config.input_model is None:
        return {"model": model}
    input_model = fingerprint_model(config.input_model, flag="--input-model", shared=shared)
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
    """Load the models and find the requested layers."""
    device = device_of_rank(config.device, world)

    def load(name: str, flag: str, layers_path: str | None) -> TransformersSource:
        source = TransformersSource(
            name,
            dtype=config.dtype,
            device=device,
            attention=config.attention,
            layers_path=layers_path,
            flag=flag,
            device_map=device_map_of(config.device_map),
        )
        check_source_reads(source, [corpus], name, flag=flag, shared=shared_place(config.output, world))
        return source

    key_source = load(config.model, "--model", config.layers_path)
    input_source = key_source
    if config.input_model is not None:
        input_source = load(config.input_model, "--input-model", config.input_layers_path)
    input_point = config.input_point or _point_of_inputs(config, input_source)
    bases = Bases(
        key_source=key_source,
        key_point=resolve_point(key_source, config.key_layer, config.key_point, flag="--key-layer"),
        input_source=input_source,
        input_point=resolve_point(
            input_source,
            config.input_layer[-1],
            input_point,
            flag="--input-layer",
            earlier=config.input_layer[:-1],
        ),
    )
    _check_repeats(bases, config)
    _try_reading(bases, corpus)
    return bases


def _point_of_inputs(config: Config, source: TransformersSource) -> Point:
    """Where inputs are read if no flag says it: that of every engine that could serve the memory, if it is
    the last layer's (docs/keys.md)."""
    last = resolve_point(source, config.input_layer[-1], config.key_point, flag="--input-layer").layer
    return "final_norm" if last == source.num_layers - 1 else config.key_point


def _check_repeats(bases: Bases, config: Config) -> None:
    """Refuse a layer that is named twice. Shares of the depth may meet in a shallow model: that is said."""
    layers = (*bases.input_point.earlier, bases.input_point.layer)
    if len(set(layers)) == len(layers):
        return
    said = (
        f"--input-layer {' '.join(map(str, config.input_layer))} names a layer twice (layers"
        f" {', '.join(map(str, layers))} of {bases.input_source.num_layers})"
    )
    whole = [layer for layer, given in zip(layers, config.input_layer, strict=True) if isinstance(given, int)]
    if len(set(whole)) < len(whole):
        raise UserError(f"{said}: give each once")
    _logger.warning("%s: its states are stored twice; give each once to save them", said)


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
    scores_N = bases.input_source.log_probabilities(batch.final_BSD[0], values_N)
    check_log_probabilities(scores_N.cpu().numpy(), positions)


def _resolve_dim(config: Config, width: int) -> int:
    """Numbers in a stored key, of a raw one of `width`."""
    for flag, dim in (("--dim", config.dim), *(("--audit-dims", dim) for dim in config.audit_dims)):
        if dim is not None and dim > width:
            raise UserError(f"{flag} {dim} is more than the {width} numbers of a raw key")
    if config.codec == "raw":
        if config.dim not in (None, width):
            raise UserError(f"--codec raw keeps all {width} numbers of a key: leave --dim out")
        return width
    if config.raw_dtype != "float16":
        _logger.warning("--raw-dtype is not used without --codec raw")
    return config.dim or min(width, 256)
