"""Part of `evaluate`: the text and the arms, opened and checked before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.engines.model_files import fetch_directory
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.stages.evaluation.arms.arm import Arm
from mlpmem_ds.stages.evaluation.arms.base import open_base
from mlpmem_ds.stages.evaluation.arms.datastore import Datastore, read_datastore
from mlpmem_ds.stages.evaluation.arms.knn import (
    open_exact,
    open_indexed,
    open_vote,
    searches_all_keys,
)
from mlpmem_ds.stages.evaluation.arms.memory import (
    MEMORY,
    MemoryArm,
    StoredMemory,
    holds_memory,
    open_memory,
    read_memory,
)
from mlpmem_ds.stages.evaluation.arms.model import ModelArm, open_model
from mlpmem_ds.stages.evaluation.config import DEFAULT_EXTRA_SPLITS, Config, control_directories
from mlpmem_ds.stages.evaluation.splits import Split, open_splits, streams_of


@dataclass(frozen=True, kw_only=True)
class Arms:
    """The arms in the order of the report, and the parts that some of them play in it."""

    all: tuple[Arm, ...]
    base: ModelArm
    """the first of them: each is compared with it"""
    subject: MemoryArm | None
    """the memory of --memory, to which each is compared too"""
    reference: Arm | None
    """kNN over all keys, by whose gain the memory's is measured"""
    controls: tuple[Arm, ...]
    """those of --control"""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that the evaluation reads, opened and checked."""

    splits: Mapping[str, Split]
    """in the order tuning, test, further test sets"""
    arms: Arms

    @property
    def streams(self) -> dict[str, CorpusSplit]:
        return streams_of(self.splits)


def open_inputs(config: Config, local_rank: int = 0) -> Inputs:
    """Open and check everything; nothing has been written yet.

    Raises:
        UserError: an input is missing, or does not belong to this base, corpus or datastore.
    """
    splits = open_splits(
        config.corpus,
        tuning=config.tuning_split,
        test=config.test_split,
        extra=config.extra_splits,
        is_extra_requested=config.extra_splits != DEFAULT_EXTRA_SPLITS,
        min_positions=config.bootstrap_block + 1,
    )
    num_queries = sum(corpus.num_positions for corpus in streams_of(splits).values())
    arms = open_arms(config, splits[config.test_split].corpus, num_queries=num_queries, local_rank=local_rank)
    _refuse_training_text(splits, arms.all)
    return Inputs(splits=splits, arms=arms)


def open_arms(config: Config, corpus: CorpusSplit, *, num_queries: int, local_rank: int) -> Arms:
    """Open every arm that the flags name; a new kind of arm is opened here.

    Args:
        config: the flags.
        corpus: any split of the text.
        num_queries: positions that will be scored.
        local_rank: of this process, which chooses its GPU.
    """
    controls = {
        name: fetch_directory(str(root), flag=f"--control {name}")
        for name, root in control_directories(config.control).items()
    }
    memories = {name for name, root in controls.items() if holds_memory(root, f"--control {name}")}
    # What is read before the base says where its layers are, if that had to be told.
    stored = _read_memories(config.memory, {name: controls[name] for name in controls if name in memories})
    datastore = read_datastore(config.keys, config.index, config.targets)
    base = open_base(
        config.model,
        corpus,
        dtype=config.dtype,
        device=config.device,
        attention=config.attention,
        local_rank=local_rank,
        layers_path=layers_path_of([memory for _, memory in stored], datastore),
        batch_windows=config.batch_windows,
    )
    arms: list[Arm] = [base]
    exact = None
    if datastore is not None:
        vote = open_vote(datastore, corpus, base=base, k=config.k, temperature=config.temperature)
        if _is_exact(config.exact, config.output, datastore, num_queries):
            arms.append(exact := open_exact(vote, base=base))
        if datastore.index is not None:
            arms.append(open_indexed(vote, datastore.index, base=base, nprobe=config.nprobe))
    joined = [
        open_memory(memory, name, corpus, base=base, weights=config.memory_weights, datastore=datastore)
        for name, memory in stored
    ]
    models = [
        open_model(
            root, name, corpus, base=base, attention=config.attention, batch_windows=config.batch_windows
        )
        for name, root in controls.items()
        if name not in memories
    ]
    subject = None if config.memory is None else joined[0]
    return Arms(
        all=_with_different_names([*arms, *joined, *models]),
        base=base,
        subject=subject,
        reference=exact,
        controls=tuple(arm for arm in (*joined, *models) if arm is not subject),
    )


def _read_memories(subject: Path | None, controls: Mapping[str, Path]) -> list[tuple[str, StoredMemory]]:
    """(name of the arm, memory), that of --memory first."""
    read = []
    if subject is not None:
        root = fetch_directory(str(subject), flag="--memory")
        read.append((MEMORY, read_memory(root, flag="--memory")))
    for name, root in controls.items():
        read.append((f"base+{name.removeprefix('base+')}", read_memory(root, flag=f"--control {name}")))
    return read


def layers_path_of(memories: Sequence[StoredMemory], datastore: Datastore | None) -> str | None:
    """Where the base's layers are, if extraction had to be told: as the first memory says, else the keys."""
    if memories:
        return memories[0].layers_path
    return None if datastore is None else datastore.layers_path


def _is_exact(exact: bool | None, output: Path, datastore: Datastore, num_queries: int) -> bool:
    """Whether all keys are searched too: as the flag says, as the report was begun, else where it is no long
    work."""
    if exact is not None:
        return exact
    begun = _exact_of_report(output)
    return searches_all_keys(datastore, num_queries) if begun is None else begun


def _exact_of_report(output: Path) -> bool | None:
    """Whether the report that was begun has the exact search; None where there is none."""
    with suppress(DamagedDataError, FileNotFoundError, NotADirectoryError, KeyError, TypeError):
        return bool(read_json(output / "identity.json")["config"]["exact"])
    return None


def _with_different_names(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    arms = tuple(arms)
    (name, count), *_ = Counter(arm.name for arm in arms).most_common(1)
    if count > 1:
        raise UserError(f"two arms have the same name, {name}: choose another for one of the controls")
    return arms


def _refuse_training_text(splits: Mapping[str, Split], arms: Sequence[Arm]) -> None:
    """No arm may be judged on text that it holds or was trained on."""
    trained = {text for arm in arms for text in arm.trained_on}
    for split in splits.values():
        if (split.corpus.sha256, split.corpus.name) in trained:
            raise UserError(
                f"the {split.name} split is the text that the keys or the memory were made from"
                f" ({split.corpus.root}, {split.corpus.name}): choose other splits, or prepare the corpus"
                " with --tuning-fraction and --test-fraction"
            )
