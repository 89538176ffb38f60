"""Part of `convert_checkpoint`: all that an export is made from, checked before a byte is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.core.run_description import find_input
from mlpmem_ds.engines.model_cards import CardFacts
from mlpmem_ds.engines.model_files import (
    GENERATION_FILE,
    check_generation_file,
    fetch_directory,
    fingerprint_model,
    model_file,
)
from mlpmem_ds.formats.checkpoint import Checkpoint
from mlpmem_ds.formats.corpus import CorpusManifest, read_corpus_manifest, vocabulary_sha256
from mlpmem_ds.formats.evaluation import Report
from mlpmem_ds.formats.gates import FittedGate, read_gate
from mlpmem_ds.formats.reference_checkpoint import SUBDIRECTORY, open_reference
from mlpmem_ds.formats.targets import TargetsManifest, open_targets
from mlpmem_ds.formats.trained_models import TrainedMemory, read_weights
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.conversion.config import Config
from mlpmem_ds.stages.conversion.export_tokenizer import check_begins, choose_tokenizer, rules_sha256
from mlpmem_ds.stages.conversion.gate_inputs import check_gate_base, places_in_gate
from mlpmem_ds.stages.conversion.import_reference import is_last_layer, read_reference
from mlpmem_ds.stages.conversion.lambda_choice import choose_lambda, read_report
from mlpmem_ds.stages.conversion.training_inputs import model_of_keys
from mlpmem_ds.stages.conversion.weights import describe_checkpoint, find_checkpoint, with_weights

FORMAT, VERSION = "mlpmem-export", 1
EXPORT_FILE = "mlpmem_export.json"
BASE_CARD = "base_card"
"""of an identity's `config`: what the card takes from that of the base, where it takes something; None: that
could not be read"""


@dataclass(frozen=True, kw_only=True)
class ExportInputs:
    """The checked inputs; nothing has been written yet."""

    trained: TrainedMemory
    memory: MemoryConfig
    model: str
    base_sha256: str
    tokenizer: Any
    lmbda: float
    lmbda_rule: str
    report: Report | None
    source: Path
    """directory of the memory"""
    corpus: CorpusManifest | None
    """None if the corpus is not on this disk"""
    targets: TargetsManifest | None
    unread: Checkpoint | None = None
    """checkpoint whose weights are still to be read; None if they are in `trained`"""
    further: tuple[TrainedMemory, ...] = ()
    """the other memories of a bank"""
    gate: FittedGate | None = None
    """finds the memories' weights at each token; None: `lmbda` at all of them"""

    @property
    def memories(self) -> tuple[TrainedMemory, ...]:
        """The memory; of a bank all of them, in the order of its gate."""
        return (self.trained, *self.further)

    @property
    def num_parameters(self) -> int:
        """Of all memories."""
        shapes = (MemoryConfig.from_dict(dict(trained.memory)) for trained in self.memories)
        return sum(shape.num_parameters() for shape in shapes)

    def identity(self, config: Config, card: CardFacts | None) -> dict[str, Any]:
        """What the weights, the configuration, the tokenizer and the model card depend on.

        Args:
            config: the flags.
            card: what the export's card takes from the base's; None: that is not known.
        """
        inputs = {
            "memory": self.trained.sha256,
            "base": self.base_sha256,
            "vocabulary": self.trained.provenance.vocabulary_sha256,
            "tokenizer": rules_sha256(self.tokenizer),
        }
        if (settings := model_file(self.model, GENERATION_FILE)) is not None:
            inputs["generation_config"] = sha256_of_file(settings)
        inputs |= {f"memory_{number}": memory.sha256 for number, memory in enumerate(self.further, start=2)}
        if self.report is not None:
            inputs["report"] = self.report.sha256
        if self.gate is not None:
            inputs["gate"] = self.gate.sha256
        return {
            "format": FORMAT,
            "version": VERSION,
            "inputs": inputs,
            "config": {
                "lambda": self.lmbda,
                "dtype": config.dtype,
                "max_shard_gigabytes": config.max_shard_gigabytes,
                **{
                    name: value
                    for name in ("base_only_threshold", "corpus_license", "license")
                    if (value := getattr(config, name)) is not None
                },
                **({"language": list(config.language)} if config.language else {}),
                **self._layer_of_published(config),
                **({} if card is not None and not card.stated() else {BASE_CARD: card and card.stated()}),
            },
        }

    def _layer_of_published(self, config: Config) -> dict[str, int]:
        """Of a published memory, whose files do not say it: the layer that it reads, where it is not the
        last."""
        layer = self.trained.provenance.input_layer
        if config.from_reference is None or is_last_layer(layer, self.model):
            return {}
        return {"input_layer": layer}


def open_inputs(config: Config) -> ExportInputs:
    """Open and check everything that the export is made from.

    Raises:
        UserError: something is missing, or does not belong to this memory.
    """
    if not config.checkpoint:
        return _open_published(config)
    opened = [_read_trained(config, root) for root in config.checkpoint]
    gate = None if config.gate is None else read_gate(config.gate)
    memories = [
        OpenedMemory(root=root, trained=trained, checkpoint=checkpoint)
        for root, (trained, checkpoint) in zip(config.checkpoint, opened, strict=True)
    ]
    memories = in_order_of_gate(memories, gate, flag="--checkpoint")
    for memory in memories if len(memories) > 1 else ():
        if memory.checkpoint is not None:
            raise UserError(
                f"--checkpoint {memory.root} is not finished, and a bank is of finished memories: finish it"
            )
    first = memories[0]
    report, reported = read_report(config.report, [(one.trained, one.root) for one in memories])
    lmbda, rule = choose_lambda(config.lmbda, reported, gate)
    inputs = open_parts(
        memories,
        model=config.model or model_of_keys(first.root, first.trained),
        gate=gate,
        lmbda=lmbda,
        lmbda_rule=rule,
        tokenizer=config.tokenizer,
        flag="--checkpoint",
    )
    return dataclasses.replace(inputs, report=report, unread=first.checkpoint)


def with_weights_read(inputs: ExportInputs, output: Path) -> ExportInputs:
    """The same with the weights that a checkpoint still holds."""
    if inputs.unread is None:
        return inputs
    trained = with_weights(inputs.trained, inputs.unread, output)
    return dataclasses.replace(inputs, trained=trained, unread=None)


@dataclass(frozen=True, kw_only=True)
class OpenedMemory:
    """A memory and where it lies; `checkpoint` still holds its weights where it has not finished."""

    root: Path
    trained: TrainedMemory
    checkpoint: Checkpoint | None = None


def in_order_of_gate(
    memories: Sequence[OpenedMemory], gate: FittedGate | None, *, flag: str
) -> list[OpenedMemory]:
    """The memories in the order in which the gate weighs them.

    Raises:
        UserError: they are not those that it was fitted for.
    """
    if gate is None:
        return list(memories)
    sha256s, roots = [one.trained.sha256 for one in memories], [one.root for one in memories]
    return [memories[place] for place in places_in_gate(gate, sha256s, roots, flag=flag)]


def open_parts(
    memories: Sequence[OpenedMemory],
    *,
    model: str,
    gate: FittedGate | None,
    lmbda: float,
    lmbda_rule: str,
    tokenizer: str | None,
    flag: str,
) -> ExportInputs:
    """Check that memories, in the order of their gate, belong to one base and its tokenizer.

    Args:
        memories: one, or those of a bank.
        model: the base.
        gate: None: `lmbda` at all tokens.
        lmbda, lmbda_rule: the weight, and in words how it was chosen.
        tokenizer: None: the base's, else the corpus's.
        flag: how messages name the memories.

    Raises:
        UserError: something is missing, or does not belong to these memories.
    """
    first = memories[0]
    trained = first.trained
    base_sha256 = fingerprint_model(model)
    check_generation_file(model)
    if gate is not None:
        check_gate_base(gate, base_sha256, model)
    for each in memories:
        _check_base(each.trained, each.root, model, base_sha256, flag)
    corpus_root = find_input(first.root, "corpus", trained.provenance.corpus)
    targets_root = find_input(first.root, "targets", trained.provenance.targets)
    opened, named = choose_tokenizer(tokenizer, model, corpus_root, f"{flag} {first.root}")
    own = vocabulary_sha256(opened)
    for each in memories:
        expected = each.trained.provenance.vocabulary_sha256
        if own != expected:
            raise UserError(
                f"{named} has another vocabulary ({len(opened)} tokens, {own[:12]}…) than the memory was "
                f"trained with ({expected[:12]}…): give --tokenizer RUN/corpus/tokenizer"
            )
    corpus = None if corpus_root is None else read_corpus_manifest(corpus_root)
    if corpus is not None:
        check_begins(opened, corpus.tokenizer, named)
    return ExportInputs(
        trained=trained,
        memory=_shape_of(trained, f"{flag} {first.root}"),
        model=model,
        base_sha256=base_sha256,
        tokenizer=opened,
        lmbda=lmbda,
        lmbda_rule=lmbda_rule,
        report=None,
        source=first.root,
        corpus=corpus,
        targets=None if targets_root is None else open_targets(targets_root, has_shards=False).manifest,
        further=tuple(each.trained for each in memories[1:]),
        gate=gate,
    )


def _shape_of(trained: TrainedMemory, named: str) -> MemoryConfig:
    try:
        return MemoryConfig.from_dict(dict(trained.memory))
    except ValueError as error:
        raise DamagedDataError(f"{named}: {error}: train it again") from error


def _check_base(trained: TrainedMemory, root: Path, model: str, base_sha256: str, flag: str) -> None:
    if base_sha256 != trained.provenance.base:
        raise UserError(
            f"--model {model} ({base_sha256[:12]}…) is not the base that {flag} {root} was"
            f" trained for ({trained.provenance.base[:12]}…): give the model that its keys were extracted"
            " with"
        )


def _open_published(config: Config) -> ExportInputs:
    """Inputs of a memory that its authors published, which lack what the authors did not write down."""
    assert config.from_reference is not None and config.model is not None
    root = fetch_directory(config.from_reference, flag="--from-reference", subdirectory=SUBDIRECTORY)
    open_reference(root)  # before the base, which may be large, is read
    base_sha256 = fingerprint_model(config.model)
    check_generation_file(config.model)
    tokenizer, _ = choose_tokenizer(config.tokenizer, config.model, None, None)
    lmbda, rule = choose_lambda(config.lmbda)
    trained = read_reference(
        root,
        name=root.resolve().name if Path(config.from_reference).exists() else config.from_reference,
        model=config.model,
        base_sha256=base_sha256,
        vocabulary_sha256=vocabulary_sha256(tokenizer),
        input_layer=config.input_layer,
    )
    return ExportInputs(
        trained=trained,
        memory=MemoryConfig.from_dict(dict(trained.memory)),
        model=config.model,
        base_sha256=base_sha256,
        tokenizer=tokenizer,
        lmbda=lmbda,
        lmbda_rule=rule,
        report=None,
        source=root,
        corpus=None,
        targets=None,
    )


def _read_trained(config: Config, root: Path) -> tuple[TrainedMemory, Checkpoint | None]:
    """The memory of a training, and the checkpoint that holds its weights (None: they are read)."""
    if (root / EXPORT_FILE).is_file():
        raise UserError(
            f"--checkpoint {root} is an export already: give the output directory of launch/train.py"
        )
    is_finished = (root / "manifest.json").is_file() or not (root / "identity.json").is_file()
    if config.step is not None or not is_finished:
        checkpoint = find_checkpoint(root, config.step)
        return describe_checkpoint(checkpoint), checkpoint
    if config.write == "memory" and (root / "manifest.json").is_file():
        raise UserError(
            f"--write memory: --checkpoint {root} is finished, and such a directory already; the flag is"
            " for --from-reference, for a training that has not finished, and for one --step of it"
        )
    return read_weights(root, flag="--checkpoint"), None
