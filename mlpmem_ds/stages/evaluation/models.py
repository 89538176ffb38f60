"""What stands beside the base in `evaluate`: memories, models of their own, the retriever; each opened and
checked.

Each check refuses a pair that does not belong together (a memory of another base, an index of other keys)
with the names of both and the remedy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.engines.hidden_states import (
    TransformersSource,
    check_source_reads,
    fingerprint_model,
    resolve_point,
)
from mlpmem_ds.formats.checkpoint import MEMORY_STAGE, read_weights
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.index_directory import IndexDirectory, open_index
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.targets import Targets, open_targets
from mlpmem_ds.maths.knn import max_keys_for_exact
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.models.backbone import CapturePoint
from mlpmem_ds.models.hf import PretrainedMemory
from mlpmem_ds.models.memory import Memory, MemoryConfig
from mlpmem_ds.models.quantized import quantize_linears
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.report.summary import KNN_EXACT, KNN_IVFPQ
from mlpmem_ds.stages.retrieval.knn_scorer import KnnScorer
from mlpmem_ds.stages.retrieval.neighbour_search import How, open_search

_logger = logging.getLogger(__name__)
_DEFAULT_K = 256


@dataclass(frozen=True, kw_only=True)
class MemoryArm:
    """A memory, checked to belong to this base and vocabulary."""

    arm: str
    root: Path
    sha256: str
    memory: Memory
    point: CapturePoint
    provenance: Mapping[str, Any]
    bytes: int
    is_training: bool


@dataclass(frozen=True, kw_only=True)
class ModelArm:
    """A language model of its own: a control that replaces the base."""

    arm: str
    path: str
    sha256: str
    source: TransformersSource


@dataclass(frozen=True, kw_only=True)
class KnnArms:
    """Stored keys to be searched, exactly and by their index: the retriever's arms.

    Attributes:
        index: of the arm `base+knn_ivfpq`; None without it.
        exact: whether there is the arm `base+knn_exact`.
        point: where in the base a query is read.
    """

    keys: Keys
    index: IndexDirectory | None
    k: int
    nprobe: int
    weighting: Weighting
    exact: bool
    point: CapturePoint

    @property
    def names(self) -> list[str]:
        return [KNN_EXACT] * self.exact + [KNN_IVFPQ] * (self.index is not None)

    @cached_property
    def scorers(self) -> dict[str, KnnScorer]:
        """By the arm's name."""
        return {name: self.scorer(name) for name in self.names}

    def scorer(self, name: str, num_keys: int | None = None) -> KnnScorer:
        """One over the first keys only, or all."""
        how: How = "exact" if name == KNN_EXACT else "index"
        search = open_search(self.keys, self.index, how=how, nprobe=self.nprobe, num_keys=num_keys)
        return KnnScorer(keys=self.keys, search=search, k=self.k, weighting=self.weighting)


def holds_memory(root: Path, flag: str) -> bool:
    """Whether a directory is a training output or an exported memory; else it is a language model."""
    identity = root / "identity.json"
    if identity.is_file() and read_json(identity).get("format") == f"mlpmem-{MEMORY_STAGE}":
        return True  # finished or not: reading it says which
    if not (root / "config.json").is_file():
        raise UserError(
            f"{flag}: {root} holds neither a memory nor a language model: give an output of launch/train.py,"
            " an exported memory, or a Hugging Face model directory"
        )
    return _is_export(root)


def _is_export(root: Path) -> bool:
    return (root / "config.json").is_file() and read_json(root / "config.json").get("model_type") == "mlpmem"


def open_memory(
    root: Path,
    arm: str,
    config: Config,
    corpus: CorpusSplit,
    source: TransformersSource,
    base_sha256: str,
    *,
    flag: str,
) -> MemoryArm:
    """Read a memory and make sure that it belongs to this base and vocabulary."""
    if _is_export(root):
        export = _read_export(root, flag)
        memory, provenance, layer, point = (
            export.module,
            export.provenance,
            export.input_layer,
            export.input_point,
        )
        vocabulary = export.vocabulary_sha256
        sha256, directory, is_training = fingerprint_model(str(root)), root, False
    else:
        trained = read_weights(root, flag=flag)
        provenance = trained.provenance
        memory = _build_memory(trained.memory, trained.weights, f"{flag} {root}")
        layer, point = provenance["input_layer"], provenance.get("input_point") or provenance["key_point"]
        vocabulary = provenance["vocabulary_sha256"]
        sha256, directory, is_training = trained.sha256, root / "weights", True
    if provenance.get("base") != base_sha256:
        raise UserError(
            f"{flag} {root} was trained for another base ({str(provenance.get('base'))[:12]}…) than --model"
            f" {config.model} ({base_sha256[:12]}…): give the base that its keys were extracted from"
        )
    if vocabulary != corpus.vocabulary_sha256 or memory.config.vocab_size < corpus.vocab_size:
        raise UserError(
            f"{flag} {root} was trained with another vocabulary ({memory.config.vocab_size} entries,"
            f" {str(vocabulary)[:12]}…) than the corpus has ({corpus.vocab_size},"
            f" {corpus.vocabulary_sha256[:12]}…): prepare the corpus with the same tokenizer"
        )
    if memory.config.input_size != source.width:
        raise UserError(
            f"{flag} {root} reads vectors of {memory.config.input_size} numbers, the base's have"
            f" {source.width}: give the base that it was trained for"
        )
    memory = memory.to(dtype=source.model.dtype, device=source.device).eval().requires_grad_(False)
    if config.memory_weights == "int8":
        quantize_linears(memory)
    return MemoryArm(
        arm=arm,
        root=root,
        sha256=sha256,
        provenance=provenance,
        is_training=is_training,
        bytes=bytes_of_model(directory),
        memory=memory,
        point=resolve_point(source, layer, point, flag=flag),
    )


def _build_memory(shape: Mapping[str, Any], weights: Mapping[str, torch.Tensor], name: str) -> Memory:
    try:
        with torch.device("meta"):
            memory = Memory(MemoryConfig.from_dict(shape))
        memory.load_state_dict(dict(weights), assign=True)
    except (ValueError, RuntimeError) as error:
        raise DamagedDataError(
            f"{name}: the weights do not fit the memory's configuration ({error}): train it again"
        ) from error
    return memory


def _read_export(root: Path, flag: str) -> PretrainedMemory:
    """The memory of an exported joint model; its base is not kept."""
    try:
        return PretrainedMemory.from_pretrained(root)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag} {root} cannot be loaded ({error}): export the memory again") from error


def open_model(
    root: Path, name: str, config: Config, corpus: CorpusSplit, *, base: TransformersSource
) -> ModelArm:
    flag = f"--control {name}"
    if (root / "identity.json").is_file() and not (root / "manifest.json").is_file():
        raise UserError(f"{flag}: {root} is not complete: run its stage again, it continues")
    sha256 = fingerprint_model(str(root))
    is_alike = read_json(root / "config.json").get("model_type") == base.model.config.model_type
    source = TransformersSource(
        str(root),
        dtype=config.dtype,
        device=str(base.device),
        attention=config.attention,
        # A base that was trained on has its layers where it had them.
        layers_path=base.layers_path if is_alike else None,
        flag=flag,
    )
    check_source_reads(source, corpus, str(root), flag=flag)
    return ModelArm(arm=name, path=str(root), sha256=sha256, source=source)


def open_datastore(
    config: Config, corpus: CorpusSplit, source: TransformersSource, base_sha256: str, *, num_queries: int
) -> KnnArms | None:
    """Open keys, index and targets, and make sure that they are of this base and of each other.

    `num_queries` is how many positions will be searched for, which decides whether all keys are compared with
    them.
    """
    if config.keys is None:
        return None
    keys = open_keys(config.keys)
    if keys.model_sha256 != base_sha256:
        remedy = "give that base, or extract keys with this one"
        if keys.base_sha256 == base_sha256:
            remedy = "its queries would need that model too: leave --keys out to compare without the kNN arms"
        raise UserError(
            f"--keys {config.keys} were extracted from another base ({keys.model_sha256[:12]}…) than --model "
            f"{config.model} ({base_sha256[:12]}…): {remedy}"
        )
    if keys.manifest.vocab_size != corpus.vocab_size:
        raise UserError(
            f"--keys {config.keys} have a vocabulary of {keys.manifest.vocab_size}, the corpus one of"
            f" {corpus.vocab_size}: prepare the corpus with the same tokenizer"
        )
    if keys.manifest.dtype not in (None, source.dtype_name):
        _logger.warning(
            "the keys were extracted in %s and the queries are computed in %s: --dtype makes them equal",
            keys.manifest.dtype,
            source.dtype_name,
        )
    index = None if config.index is None else open_index(config.index)
    if index is not None and index.keys_sha256 != keys.sha256:
        raise UserError(
            f"--index {config.index} is of other keys than --keys {config.keys}: build it again from these"
        )
    targets = None if config.targets is None else _read_targets(config.targets, keys)
    if config.temperature:
        kind = "softmax" if targets is None else targets.weighting.kind
        weighting = Weighting(kind=kind, temperature=config.temperature)
    elif targets is not None:
        weighting = targets.weighting
    else:
        raise UserError(
            "the kNN arms need a temperature: give --targets, whose temperature they take, or --temperature"
        )
    k = config.k or (targets.manifest["k"] if targets else _DEFAULT_K)
    if k > keys.num_positions:
        raise UserError(
            f"{k:,} neighbours are more than the {keys.num_positions:,} of --keys {config.keys}: give a"
            " smaller --k"
        )
    point = CapturePoint(layer=keys.manifest.key_layer, point=keys.manifest.key_point)
    return KnnArms(
        keys=keys,
        index=index,
        k=k,
        nprobe=config.nprobe,
        weighting=weighting,
        exact=_resolve_exact(config, keys.num_positions, num_queries),
        point=point,
    )


def _resolve_exact(config: Config, num_keys: int, num_queries: int) -> bool:
    """Whether the arm base+knn_exact is there: as the flag says, as the report was begun, else where it is no
    long work."""
    if config.exact is not None:
        return config.exact
    if (begun := _exact_of_report(config.output)) is not None:
        return begun
    # write_targets compares so many keys with themselves before it would rather have an index.
    exact = num_keys * num_queries <= max_keys_for_exact() ** 2
    pairs = f"{num_queries:,} positions times {num_keys:,} keys"
    if not exact and config.index is None:
        raise UserError(
            f"{pairs} are long work for exact search: give --index, or --exact to search all keys"
            " nevertheless"
        )
    if exact:
        _logger.info("%s: all keys are searched too (base+knn_exact); --no-exact leaves that out", pairs)
    else:
        _logger.info(
            "%s are long work: without base+knn_exact; --exact searches all keys nevertheless", pairs
        )
    return exact


def _exact_of_report(output: Path) -> bool | None:
    with suppress(DamagedDataError, FileNotFoundError, NotADirectoryError, KeyError, TypeError):
        found = read_json(output / "identity.json")["config"]["exact"]
        return found if isinstance(found, bool) else None
    return None


def _read_targets(root: Path, keys: Keys) -> Targets:
    targets = open_targets(root)
    if targets.keys_sha256 != keys.sha256:
        raise UserError(
            f"--targets {root} are of other keys than --keys {keys.root}: write them again from these"
        )
    return targets


def bytes_of_model(root: Path) -> int:
    """Configuration and weights of a model directory."""
    files = [root / "config.json", *root.glob("*.safetensors"), *root.glob("*.bin")]
    return sum(path.stat().st_size for path in files if path.is_file())
