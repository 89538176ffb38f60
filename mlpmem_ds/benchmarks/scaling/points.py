"""Part of `fit_scaling`: reports of `evaluate` → points, one a report and arm.

Compute is counted, not measured: 6 floating-point operations a parameter and token that is learnt, 2 where a
model only reads, 4 a parameter of the base's head where a memory learns through it as it is. A memory also
costs the base's pass over its training text and the retriever's search, if it learnt from its targets, and
needs the base.

M documents, R draws, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlpmem_ds.benchmarks.quality.bootstrap import draw_documents
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.core.manifest import CompleteStage, format_of, read_stage
from mlpmem_ds.core.run_description import find_input, flags_of_run
from mlpmem_ds.formats.corpus import num_tokens_of_splits
from mlpmem_ds.formats.evaluation import Evaluation, Report, open_report, read_document_sums
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import Keys, KeysManifest
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.formats.trained_models import (
    BaseManifest,
    Provenance,
    TrainingResult,
    read_memory_description,
)
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.evaluation.config import memory_directories
from mlpmem_ds.stages.planning.counts import keys_of_probes

DECODER, WITH_MEMORY = "decoder alone", "decoder + memory"
NUM_DRAWS = 1000
_SEARCH = "what the search cost"
Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm of one report."""

    arm: str
    """DECODER or WITH_MEMORY"""
    parameters: float
    compute: float
    """floating-point operations to make it"""
    loss: float
    """nats a token of the test split"""
    base_is_past_best: bool | None
    """whether its base was validated best before its last step; None where it was not validated"""
    positions_M: Array = field(repr=False)
    sums_M: Array = field(repr=False)
    """natural log-probabilities by document"""


def read_points(reports: Sequence[Path]) -> list[Point]:
    """The base and the memory of each report.

    Raises:
        UserError: a report has no memory, is of another text than the first, or what its base or its memory
            cost is not known: the base was not trained by train_base, the memory or its targets are from
            elsewhere, or it, its text or its targets are gone.
    """
    points: list[Point] = []
    for root in reports:
        report = open_report(root, flag="--reports")
        evaluation = report.evaluation
        if evaluation.subject is None:
            raise UserError(f"--reports {root} has no memory: evaluate it with --memory")
        documents = read_document_sums(root, evaluation.test_split)
        base, memory = evaluation.base, evaluation.arm(evaluation.subject)
        training = _training_of_base(evaluation, root)
        learnt = 6 * base.parameters * training.steps * training.rows_per_step
        trained = _trained_memories(report, root)
        read = 2 * base.parameters * _tokens_read_for(trained, evaluation, root)
        both = learnt + read + _operations_of_search(trained, root) + sum(one.operations for one in trained)
        for name, arm, compute in ((DECODER, base, learnt), (WITH_MEMORY, memory, both)):
            points.append(
                Point(
                    arm=name,
                    parameters=float(arm.parameters),
                    compute=float(compute),
                    loss=-float(documents.sums[arm.name].sum() / documents.positions_M.sum()),
                    base_is_past_best=training.is_past_best,
                    positions_M=documents.positions_M,
                    sums_M=documents.sums[arm.name],
                )
            )
        if not np.array_equal(points[0].positions_M, documents.positions_M):
            raise UserError(
                f"--reports {root} is of another text than {reports[0]}: sizes are compared on one text"
            )
    return points


def _training_of_base(evaluation: Evaluation, root: Path) -> TrainingResult:
    base = Path(evaluation.model)
    if not base.is_dir() or format_of(base) != BaseManifest.FORMAT:
        raise UserError(
            f"--reports {root}: the base {evaluation.model} is no output of train_base, so what it cost is"
            " not known: give reports of bases that were trained here"
        )
    stage: CompleteStage[BaseManifest] = read_stage(CompleteStage, BaseManifest, base, flag="--reports")
    return stage.manifest.training


@dataclass(frozen=True, kw_only=True)
class _TrainedMemory:
    """One of a subject's memories, where it was evaluated."""

    name: str
    root: Path
    provenance: Provenance
    operations: int
    """of its training, without what was made before"""


def _trained_memories(report: Report, root: Path) -> list[_TrainedMemory]:
    """The subject's."""
    evaluation = report.evaluation
    subject = evaluation.subject
    memories = memory_directories(flags_of_run(root).get("memory", ()))
    if subject in memories:  # else it is the bank of all
        memories = {subject: memories[subject]}
    trained = []
    for name, directory in memories.items():
        figures, memory = evaluation.arm(name), Path(directory)
        if figures.tokens is None:
            raise UserError(
                f"--reports {root}: how many tokens {name} was trained on is not known, so what it cost is"
                " not: give reports of memories that were trained here"
            )
        manifest = memory / "manifest.json"
        if not manifest.is_file() or sha256_of_file(manifest) != report.inputs.get(name):
            raise UserError(
                f"--reports {root}: {name}, {memory}, is not there as it was evaluated, so the text of its"
                " training is not known: evaluate it again, as an output of launch/train.py"
            )
        described = read_memory_description(memory / "weights" / "config.json")
        shape = MemoryConfig.from_dict(described.memory)
        own = figures.parameters - evaluation.base.parameters
        # A head that stays as it is has no gradient of its own weights.
        token_operations = 6 * own + 4 * shape.num_shared_parameters()
        trained.append(
            _TrainedMemory(
                name=name,
                root=memory,
                provenance=described.provenance,
                operations=token_operations * figures.tokens,
            )
        )
    return trained


def _tokens_read_for(memories: Sequence[_TrainedMemory], evaluation: Evaluation, report: Path) -> int:
    """Of the texts that the memories were trained on, which may be others than the evaluated one; what
    several were trained on was read once."""
    corpora = {}
    for memory in memories:
        sha256 = memory.provenance.corpus
        corpora[sha256] = _find_input(
            *(memory.root, "corpus", sha256),
            given=Path(evaluation.corpus),
            what=f"the text that {memory.name} was trained on",
            cost="what the base read for it",
            report=report,
        )
    return sum(num_tokens_of_splits(corpus, flag="--reports")["train"] for corpus in corpora.values())


def _operations_of_search(memories: Sequence[_TrainedMemory], report: Path) -> float:
    """Products of queries and keys, without what the index and the sample for the temperature cost; targets
    that several memories learnt from were searched once."""
    searched = {}
    for memory in memories:
        sha256 = memory.provenance.targets
        if sha256 is not None and memory.provenance.alpha != 0:
            what = f"what {memory.name} learnt from the retriever"
            searched[sha256] = _find_input(
                memory.root, "targets", sha256, what=what, cost=_SEARCH, report=report
            )
    return sum(_operations_of_targets(path, report) for path in searched.values())


def _operations_of_targets(root: Path, report: Path) -> float:
    targets = open_targets(root, flag="--reports", has_shards=False)

    def required(name: str) -> Path:
        what = f"what {root} were made from"
        return _find_input(root, name, targets.inputs.get(name), what=what, cost=_SEARCH, report=report)

    keys = read_stage(Keys, KeysManifest, required("keys"), flag="--reports", has_files=False)
    positions, compared = targets.num_positions, float(targets.num_positions)
    if targets.manifest.search != "exact":
        num_lists = open_index(required("index"), flag="--reports").num_lists
        nprobe = targets.manifest.nprobe or num_lists
        compared = num_lists + keys_of_probes(positions, num_lists=num_lists, nprobe=nprobe)
    return 2.0 * keys.dim * positions * compared


def _find_input(
    of: Path, name: str, sha256: str | None, *, what: str, cost: str, report: Path, given: Path | None = None
) -> Path:
    """As `find_input`; raises UserError where there is none, and says what of which cost is missing."""
    found = find_input(of, name, sha256, given=given)
    if found is None:
        raise UserError(
            f"--reports {report}: {what} is not found, so {cost} is not known: put its {name} where it was,"
            f" or as `{name}` next to {of}"
        )
    return found


def drawn_losses(points: Sequence[Point]) -> Array:
    """[R, P]: the losses of each point for draws of whole documents, the same ones for all points."""
    counts_RM = draw_documents(len(points[0].positions_M), NUM_DRAWS)
    columns = [-(counts_RM @ point.sums_M) / (counts_RM @ point.positions_M) for point in points]
    losses_RP: Array = np.stack(columns, axis=1)
    return losses_RP
