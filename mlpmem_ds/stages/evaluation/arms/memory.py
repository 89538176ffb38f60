"""An arm that mixes the base with a memory: `--memory`, and `--control base+NAME=DIR` for others.

Each check refuses a pair that does not belong together, with the names of both and the remedy.

n positions of a block, D width of a state, H hidden size of the memory, V vocabulary, J tokens asked for at a
position.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import read_json_object
from mlpmem_ds.core.run_description import find_input
from mlpmem_ds.core.typed_json import from_json
from mlpmem_ds.engines.finite_scores import check_finite
from mlpmem_ds.engines.hidden_states import resolve_point, state_width, weights_on_device
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.trained_models import (
    MemoryManifest,
    Provenance,
    TrainedMemory,
    read_memory_description,
    read_weights,
)
from mlpmem_ds.maths.head_scores import HeadScores, head_scores
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM, load_memory
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.pretrained_memory import PretrainedMemory, build_memory
from mlpmem_ds.models.quantized import Int8Linear, quantize_linears
from mlpmem_ds.models.shared_head import SharedHead
from mlpmem_ds.stages.evaluation.arms.arm import (
    Arm,
    Part,
    Price,
    Scores,
    scores_beside_base,
    sum_of_logs,
    tokens_beside_base,
)
from mlpmem_ds.stages.evaluation.arms.base import Context, ModelArm, bytes_of_model
from mlpmem_ds.stages.evaluation.arms.controls import is_export, memory_controls
from mlpmem_ds.stages.evaluation.arms.datastore import stages_of_targets
from mlpmem_ds.stages.evaluation.config import Config, control_directories, memory_directories
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass, Scan

_ROWS = 2048  # whose activations are in memory: 4 · F bytes each and matrix, 117 MB for F = 14,336
_INT8_ROWS = 256  # whose logits are in memory where the head is int8


@dataclass(frozen=True, kw_only=True)
class StoredMemory:
    """A memory as it was read, before it is known to belong to the base."""

    root: Path
    flag: str
    sha256: str
    memory: Memory = field(repr=False)
    layer: int | float
    point: str
    earlier: tuple[int, ...]
    vocabulary_sha256: str
    provenance: Provenance
    bytes: int
    is_training: bool
    """an output of `train`; else an exported model"""


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryArm(Arm):
    """The base mixed with a memory."""

    name: str
    description: str
    part: Part
    base: ModelArm
    memory: Memory
    point: CapturePoint
    forward_pass: ForwardPass
    price: Price
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    resolved: Mapping[str, Any]
    reads: tuple[CapturePoint, ...]
    trained_on: tuple[tuple[str, str], ...]

    def score(self, scan: Scan) -> Scores:
        found = memory_scores(self.memory, scan.states[self.point], tokens_beside_base(scan))
        return scores_beside_base(found, scan)

    def joint_model(self, lmbda: float, chosen: Mapping[str, float]) -> MemoryAugmentedLM:
        return joint_of((self,), lmbda)


def joint_of(arms: Sequence[MemoryArm], lmbda: float) -> MemoryAugmentedLM:
    """Base and memories of one base as one model, which generates text; their weights are not copied."""
    source = arms[0].base.source
    with torch.device("meta"):  # an int8 memory cannot be taken apart and put together again
        stand_ins = [Memory(arm.memory.config) for arm in arms]
    provenance = {"input_layers_path": source.layers_path}
    memories = [
        PretrainedMemory(module=stand_in, **arm.point.settings(), provenance=provenance)
        for arm, stand_in in zip(arms, stand_ins, strict=True)
    ]
    joint = MemoryAugmentedLM.join(source.model, memories, lmbda=lmbda, cast=False)
    joint.memory = arms[0].memory
    for number, arm in enumerate(arms[1:]):
        joint.further_memories[number] = arm.memory
    return joint


def open_arms(config: Config, context: Context) -> list[MemoryArm]:
    """The memories of `--memory`, and the controls that are memories. See `base.Opener`."""
    arms = open_memories(config, context)
    for name, root in memory_controls(config).items():
        flag, arm = f"--control {name}", f"base+{name.removeprefix('base+')}"
        arms.append(_open_memory(root, flag, arm, "control", config, context))
    return arms


def open_memories(config: Config, context: Context) -> list[MemoryArm]:
    """The memories of `--memory` alone."""
    memories = memory_directories(config.memory)
    part: Part = "subject" if len(memories) == 1 else "other"  # of several, their bank is the subject
    return [
        _open_memory(Path(root), "--memory", name, part, config, context) for name, root in memories.items()
    ]


def layers_paths(config: Config) -> list[str | None]:
    """Where the base's layers are, as each memory says; None: its training found them."""
    told: list[str | None] = []
    memories = map(Path, memory_directories(config.memory).values())
    for root in (*memories, *control_directories(config.control).values()):
        weights, export = root / "weights" / "config.json", root / "config.json"
        if weights.is_file():
            told.append(read_memory_description(weights).provenance.input_layers_path)
        elif export.is_file() and "layers_path" in (description := read_json_object(export)):
            told.append(description["layers_path"])
    return told


def _open_memory(root: Path, flag: str, name: str, part: Part, config: Config, context: Context) -> MemoryArm:
    stored = read_memory(root, flag=flag, shared=context.shared)
    base, weights = context.base, config.memory_weights
    for corpus in context.corpora:
        _check_belongs(stored, base, corpus)
    source, provenance = base.source, stored.provenance
    memory = stored.memory.to(dtype=source.model.dtype, device=source.device).eval().requires_grad_(False)
    memory.share_head(source.model.get_output_embeddings())
    num_parameters = memory.config.num_parameters()
    if weights == "int8":
        quantize_linears(memory)
    point = resolve_point(source, stored.layer, stored.point, flag=flag, earlier=stored.earlier)
    point = replace(point, past=memory.config.window - 1)
    _check_width(stored, base, point)
    return MemoryArm(
        name=name,
        description=memory_description(
            provenance, weights, shares_head=memory.config.shared_head is not None
        ),
        part=part,
        base=base,
        memory=memory,
        point=point,
        forward_pass=base.forward_pass,
        price=base.price.plus(
            parameters=num_parameters,
            bytes=stored.bytes,
            seconds=sum_of_logs(_stages(stored, config)),
            tokens=provenance.num_positions_read,
        ),
        inputs={name: stored.sha256},
        settings={"memory_weights": weights},
        resolved={"memory_weights": weights},
        reads=(point,),
        trained_on=((str(provenance.corpus), "train"),),
    )


def _stages(stored: StoredMemory, config: Config) -> list[Path | None]:
    """The directories of all stages that made a memory; None in the place of one that is not found. Those
    that the flags name count only where they are the memory's own."""
    provenance, root = stored.provenance, stored.root
    if not stored.is_training or provenance.init_from is not None:  # what it starts from took time too
        return [None]
    if provenance.control == "random-memory":
        return [root]
    keys = find_input(root, "keys", provenance.keys, given=config.keys)
    if provenance.alpha == 0:
        return [keys, root]
    targets = find_input(root, "targets", provenance.targets, given=config.targets)
    return [keys, *stages_of_targets(targets, index=config.index), root]


def read_memory(root: Path, *, flag: str, shared: Path | None = None) -> StoredMemory:
    """Read a training output or an export, whose fingerprint one of several ranks computes and keeps in
    `shared`.

    Raises:
        UserError: it is neither, or not complete.
        DamagedDataError: its files do not fit each other.
    """
    return _read_export(root, flag, shared) if is_export(root) else _read_training(root, flag)


def _read_training(root: Path, flag: str) -> StoredMemory:
    trained = read_weights(root, flag=flag)
    provenance = trained.provenance
    return StoredMemory(
        root=root,
        flag=flag,
        sha256=trained.sha256,
        memory=_memory_of(trained, f"{flag} {root}"),
        layer=provenance.input_layer,
        point=provenance.input_point,
        earlier=provenance.input_earlier_layers,
        vocabulary_sha256=provenance.vocabulary_sha256,
        provenance=provenance,
        bytes=bytes_of_model(root / "weights"),
        is_training=True,
    )


def _read_export(root: Path, flag: str, shared: Path | None) -> StoredMemory:
    """The memory of an exported joint model; its base is not kept."""
    try:
        export = load_memory(root)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag} {root} cannot be loaded ({error}): export the memory again") from error
    return StoredMemory(
        root=root,
        flag=flag,
        sha256=fingerprint_model(str(root), flag=flag, shared=shared),
        memory=export.module,
        layer=export.input_layer,
        point=export.input_point,
        earlier=tuple(export.input_earlier_layers),
        vocabulary_sha256=export.vocabulary_sha256,
        provenance=from_json(
            Provenance,
            export.provenance,
            where=f"{root / 'config.json'}, provenance",
            version=MemoryManifest.VERSION,
        ),
        bytes=bytes_of_model(root),
        is_training=False,
    )


def _memory_of(trained: TrainedMemory, name: str) -> Memory:
    try:
        return build_memory(trained.memory, trained.weights)
    except ValueError as error:
        raise DamagedDataError(
            f"{name}: the weights do not fit the memory's configuration ({error}): train it again"
        ) from error


def _check_belongs(stored: StoredMemory, base: ModelArm, corpus: CorpusSplit) -> None:
    named = f"{stored.flag} {stored.root}"
    trained_for = stored.provenance.base
    if trained_for != base.sha256:
        raise UserError(
            f"{named} was trained for another base ({trained_for[:12]}…) than --model"
            f" {base.path} ({base.sha256[:12]}…): give the base that its keys were extracted from"
        )
    config = stored.memory.config
    if stored.vocabulary_sha256 != corpus.vocabulary_sha256:
        raise UserError(
            f"{named} was trained with another vocabulary ({config.vocab_size} entries,"
            f" {str(stored.vocabulary_sha256)[:12]}…) than the corpus {corpus.root} has ({corpus.vocab_size},"
            f" {corpus.vocabulary_sha256[:12]}…): prepare the corpus with the same tokenizer"
        )
    begin = stored.provenance.begin_of_window_ids
    if begin is not None and begin != corpus.begin_of_document_ids:
        raise UserError(
            f"{named} was trained on windows that begin with the tokens {list(begin)}, those of the corpus"
            f" {corpus.root} begin with {list(corpus.begin_of_document_ids)}: prepare the corpus with the"
            " same tokenizer"
        )
    if config.vocab_size != base.source.vocab_size:  # of the head, rows beyond the tokenizer's included
        raise UserError(
            f"{named} predicts {config.vocab_size} tokens, and the base has rows for"
            f" {base.source.vocab_size}: give the base that it was trained for"
        )


def _check_width(stored: StoredMemory, base: ModelArm, point: CapturePoint) -> None:
    own, given = stored.memory.config.input_size, state_width(base.source, point)
    if own != given:
        raise UserError(
            f"{stored.flag} {stored.root} reads vectors of {own} numbers, the base's have"
            f" {given}: give the base that it was trained for"
        )


_TRAINED = {
    "imitation": "to imitate the retriever",
    "helpful": "to imitate the retriever where it is better than the base",
    "joined": "to imitate the retriever joined with the base",
}
_CONTROLS = {
    "random-memory": "was not trained at all: its weights are the random ones that a training starts from",
    "permuted-targets": (
        "was trained on the retriever's targets of other positions, which say nothing of its own text"
    ),
}


def memory_description(provenance: Provenance, weights: str, *, shares_head: bool = False) -> str:
    """The arm of a memory in words: how it was trained, or which control it is.

    Args:
        provenance: of the memory.
        weights: `--memory-weights`.
        shares_head: its output head is the base's.
    """
    rounded = "; its matrices are rounded to int8 once read" if weights == "int8" else ""
    rounded = f"; its output head is the base's own{rounded}" if shares_head else rounded
    if provenance.control is not None:
        what = _CONTROLS[provenance.control]
        return f"a control: the base mixed with a feed-forward network that {what}{rounded}"
    trained = _TRAINED.get(provenance.objective or "imitation", _TRAINED["imitation"])
    if provenance.alpha == 0:
        trained = "on the text alone, without the retriever (α = 0)"
    return (
        f"the base mixed with a memory, a feed-forward network that was trained {trained} and needs no search"
        f" and no datastore{rounded}"
    )


@torch.no_grad()
def memory_states(memory: Memory, inputs_nD: torch.Tensor) -> torch.Tensor:
    """What the memory's head reads, [n, H] in the memory's dtype and on its device."""
    return torch.cat([memory(memory.cast(part)) for part in inputs_nD.split(_ROWS)])


@torch.no_grad()
def memory_scores(memory: Memory, inputs_nD: torch.Tensor, tokens_nJ: np.ndarray) -> HeadScores:
    """log p_mem of the tokens, its likeliest token and its entropy, from float32 logits; the inputs are taken
    to the memory's dtype and device.

    Raises:
        UserError: one is not a number, as damaged weights or an overflow in float16 make it.
    """
    hidden_nH = memory_states(memory, inputs_nD)
    tokens = torch.from_numpy(tokens_nJ).to(hidden_nH.device)
    if isinstance(memory.head, Int8Linear):  # its own product, as generation meets it
        scores = _int8_scores(memory.head, hidden_nH, tokens)
    else:
        scores = _float_scores(memory.head, hidden_nH, tokens)
    check_finite(scores.log_probabilities_NJ, of="a memory")
    return scores


def _float_scores(head: Any, hidden_nH: torch.Tensor, tokens_nJ: torch.Tensor) -> HeadScores:
    is_shared = isinstance(head, SharedHead)
    with weights_on_device(head.module) if is_shared else contextlib.nullcontext():
        transform = None if head.transform.is_identity else head.transform
        device = head.weight.device
        return head_scores(
            hidden_nH.to(device), head.weight, tokens_nJ.to(device), bias=head.bias, transform=transform
        )


def _int8_scores(head: Int8Linear, hidden_nH: torch.Tensor, tokens_nJ: torch.Tensor) -> HeadScores:
    parts = []
    for rows, columns in zip(hidden_nH.split(_INT8_ROWS), tokens_nJ.split(_INT8_ROWS), strict=True):
        log_nV = head(rows).float().log_softmax(-1)
        top_n, top_ids_n = log_nV.max(-1)
        parts.append((log_nV.gather(1, columns), top_ids_n, top_n, torch.special.entr(log_nV.exp()).sum(-1)))
    named_nJ, top_ids_n, top_n, entropies_n = (torch.cat(column) for column in zip(*parts, strict=True))
    return HeadScores(
        log_probabilities_NJ=named_nJ, top_ids_N=top_ids_n, top_N=top_n, entropies_N=entropies_n
    )
