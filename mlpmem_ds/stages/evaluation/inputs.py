"""What `evaluate` reads (splits, base, retriever, memories, controls), opened and checked before anything is
written.

N positions.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.core.log import seconds_of_stage
from mlpmem_ds.engines.hidden_states import (
    TransformersSource,
    check_source_reads,
    fingerprint_model,
)
from mlpmem_ds.engines.model_files import fetch_directory
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.stages.evaluation.config import DEFAULT_EXTRA_SPLITS, Config, control_directories
from mlpmem_ds.stages.evaluation.models import (
    KnnArms,
    MemoryArm,
    ModelArm,
    holds_memory,
    open_datastore,
    open_memory,
    open_model,
)
from mlpmem_ds.stages.report.summary import BASE, KNN_EXACT, KNN_IVFPQ, MEMORY

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is scored as one: all positions of a stream, or those of half its documents."""

    name: str
    corpus: CorpusSplit
    positions: np.ndarray | None
    num_bytes: int

    @property
    def num_positions(self) -> int:
        return self.corpus.num_positions if self.positions is None else len(self.positions)

    def take(self, scores_N: np.ndarray) -> np.ndarray:
        """This split's rows of its stream's scores."""
        return scores_N if self.positions is None else scores_N[self.positions]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that the evaluation reads, opened and checked."""

    splits: Mapping[str, Split]  # in the order tuning, test, extra
    source: TransformersSource
    base_sha256: str
    datastore: KnnArms | None
    memories: Sequence[MemoryArm]
    models: Sequence[ModelArm]
    seconds: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def streams(self) -> dict[str, CorpusSplit]:
        return {split.corpus.name: split.corpus for split in self.splits.values()}

    @property
    def base_arms(self) -> list[str]:
        """The arms that one pass of the base gives, itself first."""
        kinds = [] if self.datastore is None else self.datastore.names
        return [BASE, *kinds, *(memory.arm for memory in self.memories)]

    @property
    def arms(self) -> list[str]:
        return [*self.base_arms, *(model.arm for model in self.models)]


def open_inputs(config: Config, local_rank: int = 0) -> Inputs:
    """Open and check everything; nothing has been written yet.

    Raises:
        UserError: an input is missing, or does not belong to this base, corpus or datastore.
    """
    config = _with_fetched_memories(config)
    splits = _open_splits(config)
    corpus = splits[config.test_split].corpus
    base_sha256 = fingerprint_model(config.model)
    source = TransformersSource(
        config.model,
        dtype=config.dtype,
        device=config.device,
        attention=config.attention,
        local_rank=local_rank,
        layers_path=_layers_path(config),
    )
    check_source_reads(source, corpus, config.model)
    memories = (
        []
        if config.memory is None
        else [open_memory(config.memory, MEMORY, config, corpus, source, base_sha256, flag="--memory")]
    )
    models = []
    for name, root in control_directories(config.control).items():
        flag = f"--control {name}"
        if holds_memory(root, flag):
            arm = f"base+{name.removeprefix('base+')}"
            memories.append(open_memory(root, arm, config, corpus, source, base_sha256, flag=flag))
        elif name.startswith("base+"):
            raise UserError(
                f"{flag}: {root} is a language model of its own, and arms named base+… are the base with"
                " something beside it: choose another name"
            )
        else:
            models.append(open_model(root, name, config, corpus, base=source))
    if len({memory.arm for memory in memories}) < len(memories):
        raise UserError("two of the controls have the same name: choose another for one of them")
    num_queries = sum({split.corpus.name: split.corpus.num_positions for split in splits.values()}.values())
    datastore = open_datastore(config, corpus, source, base_sha256, num_queries=num_queries)
    _refuse_training_text(splits, memories, datastore)
    return Inputs(
        splits=splits,
        source=source,
        base_sha256=base_sha256,
        datastore=datastore,
        memories=memories,
        models=models,
        seconds=_seconds(config, memories, models),
    )


def _with_fetched_memories(config: Config) -> Config:
    """The same with directories in the place of Hub names."""
    memory = None if config.memory is None else fetch_directory(str(config.memory), flag="--memory")
    controls = control_directories(config.control).items()
    fetched = tuple(
        f"{name}={fetch_directory(str(root), flag=f'--control {name}')}" for name, root in controls
    )
    return dataclasses.replace(config, memory=memory, control=fetched)


def _layers_path(config: Config) -> str | None:
    """Where the base's layers are, if extraction had to be told: as the memory says, a control's memory, or
    the keys."""
    controls = control_directories(config.control).values()
    for memory in (*([] if config.memory is None else [config.memory]), *controls):
        weights, export = memory / "weights" / "config.json", memory / "config.json"
        if weights.is_file():
            return (read_json(weights).get("provenance") or {}).get("input_layers_path")
        if export.is_file() and "layers_path" in (description := read_json(export)):
            return description["layers_path"]
    if config.keys is not None and (config.keys / "manifest.json").is_file():
        return open_keys(config.keys).manifest.layers_path
    return None


def _open_splits(config: Config) -> dict[str, Split]:
    """Tuning, test and further splits; a corpus that was not split is dealt in halves by the documents'
    names."""
    present = {name for name, tokens in num_tokens_of_splits(config.corpus).items() if tokens >= 2}
    wanted = [
        config.tuning_split,
        config.test_split,
        *(name for name in config.extra_splits if name in present),
    ]
    if present == {"train"} and "train" not in wanted:
        splits = _deal_halves(config)
    else:
        for name in config.extra_splits:
            if name not in present and config.extra_splits != DEFAULT_EXTRA_SPLITS:
                _logger.info("the corpus has no split %s: the report goes without it", name)
        corpora = {name: open_corpus(config.corpus, name) for name in wanted}
        splits = {
            name: Split(name=name, corpus=corpus, positions=None, num_bytes=corpus.num_bytes)
            for name, corpus in corpora.items()
        }
    for split in splits.values():
        if split.num_positions <= config.bootstrap_block or split.num_bytes == 0:
            raise UserError(
                f"the {split.name} split has {split.num_positions:,} positions, and the intervals need more"
                f" than one block of --bootstrap-block {config.bootstrap_block}: give more text or a smaller"
                " block"
            )
    return splits


def _deal_halves(config: Config) -> dict[str, Split]:
    corpus = open_corpus(config.corpus, "train")
    is_tuning = np.array(
        [hash_fraction(f"evaluate:{document['name']}") < 0.5 for document in corpus.documents]
    )
    sizes = np.array([document["bytes"] for document in corpus.documents])
    document_of_N = corpus.documents_of(np.arange(corpus.num_positions))
    _logger.info(
        "the corpus is not split: its %d documents are dealt to %s and %s by their names",
        len(sizes),
        config.tuning_split,
        config.test_split,
    )
    return {
        name: Split(
            name=name,
            corpus=corpus,
            positions=np.flatnonzero(chosen[document_of_N]),
            num_bytes=int(sizes[chosen].sum()),
        )
        for name, chosen in ((config.tuning_split, is_tuning), (config.test_split, ~is_tuning))
    }


def _refuse_training_text(
    splits: Mapping[str, Split], memories: Sequence[MemoryArm], datastore: KnnArms | None
) -> None:
    """No arm may be judged on the text that the datastore holds or the memory was trained on."""
    trained = {
        (memory.provenance.get("corpus"), memory.provenance.get("split", "train")) for memory in memories
    }
    if datastore is not None:
        trained.add((datastore.keys.corpus_sha256, datastore.keys.manifest.split))
    for split in splits.values():
        if (split.corpus.sha256, split.corpus.name) in trained:
            raise UserError(
                f"the {split.name} split is the text that the keys or the memory were made from"
                f" ({split.corpus.root}, {split.corpus.name}): choose other splits, or prepare the corpus"
                " with --tuning-fraction and --test-fraction"
            )


def _seconds(
    config: Config, memories: Sequence[MemoryArm], models: Sequence[ModelArm]
) -> dict[str, float | None]:
    """Arm → seconds that its stages took beyond the base, from their logs; None where a log is not at
    hand."""
    targets = None if config.targets is None else read_json(config.targets / "manifest.json")
    searched = [config.index] if targets is not None and targets["search"] == "ivf" else []
    seconds: dict[str, float | None] = {
        BASE: 0.0,
        KNN_EXACT: _sum_of_logs([config.keys]),
        KNN_IVFPQ: _sum_of_logs([config.keys, config.index]),
    }
    for memory in memories:
        root = memory.root if memory.is_training else None
        needs_targets = memory.provenance.get("alpha") != 0
        stages = [config.keys, *(searched + [config.targets] if needs_targets else []), root]
        seconds[memory.arm] = _sum_of_logs(stages)
    return seconds | {model.arm: _sum_of_logs([Path(model.path)]) for model in models}


def _sum_of_logs(roots: Sequence[Path | None]) -> float | None:
    logged = [None if root is None else seconds_of_stage(root) for root in roots]
    return None if None in logged else sum(seconds for seconds in logged if seconds is not None)
