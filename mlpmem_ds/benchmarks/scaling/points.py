"""Part of `fit_scaling`: reports of `evaluate` → points, one a report and arm.

Compute is counted, not measured: 6 floating-point operations a parameter and token that is learnt, 2 where a
model only reads. A memory also costs the base's pass over its training text, and needs the base.

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
from mlpmem_ds.formats.evaluation import ArmFigures, Evaluation, Report, open_report, read_document_sums
from mlpmem_ds.formats.trained_models import BaseManifest, read_memory_description
from mlpmem_ds.stages.evaluation.config import memory_directories

DECODER, WITH_MEMORY = "decoder alone", "decoder + memory"
NUM_DRAWS = 1000
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
    positions_M: Array = field(repr=False)
    sums_M: Array = field(repr=False)
    """natural log-probabilities by document"""


def read_points(reports: Sequence[Path]) -> list[Point]:
    """The base and the memory of each report.

    Raises:
        UserError: a report has no memory, is of another text than the first, or what its base or its memory
            cost is not known: the base was not trained by train_base, the memory is from elsewhere, or it or
            the text that it was trained on is gone.
    """
    points: list[Point] = []
    for root in reports:
        report = open_report(root, flag="--reports")
        evaluation = report.evaluation
        if evaluation.subject is None:
            raise UserError(f"--reports {root} has no memory: evaluate it with --memory")
        documents = read_document_sums(root, evaluation.test_split)
        base, memory = evaluation.base, evaluation.arm(evaluation.subject)
        if memory.tokens is None:
            raise UserError(
                f"--reports {root}: how many tokens {evaluation.subject} was trained on is not known, so what"
                " it cost is not: give reports of memories that were trained here"
            )
        learnt = 6 * base.parameters * _tokens_of_base(evaluation, root)
        read = 2 * base.parameters * _tokens_read_for_memory(report, root)
        added = memory.parameters - base.parameters
        both = learnt + read + 6 * added * memory.tokens
        for name, arm, compute in ((DECODER, base, learnt), (WITH_MEMORY, memory, both)):
            points.append(_point(name, arm, compute, documents.positions_M, documents.sums[arm.name]))
        if not np.array_equal(points[0].positions_M, documents.positions_M):
            raise UserError(
                f"--reports {root} is of another text than {reports[0]}: sizes are compared on one text"
            )
    return points


def _point(name: str, arm: ArmFigures, compute: float, positions_M: Array, sums_M: Array) -> Point:
    return Point(
        arm=name,
        parameters=float(arm.parameters),
        compute=float(compute),
        loss=float(-sums_M.sum() / positions_M.sum()),
        positions_M=positions_M,
        sums_M=sums_M,
    )


def _tokens_of_base(evaluation: Evaluation, root: Path) -> int:
    base = Path(evaluation.model)
    if not base.is_dir() or format_of(base) != BaseManifest.FORMAT:
        raise UserError(
            f"--reports {root}: the base {evaluation.model} is no output of train_base, so what it cost is"
            " not known: give reports of bases that were trained here"
        )
    stage: CompleteStage[BaseManifest] = read_stage(CompleteStage, BaseManifest, base, flag="--reports")
    return stage.manifest.training.steps * stage.manifest.training.rows_per_step


def _tokens_read_for_memory(report: Report, root: Path) -> int:
    """Of the texts that the subject's memories were trained on, which may be others than the evaluated one;
    what several were trained on was read once."""
    evaluation = report.evaluation
    memories = memory_directories(flags_of_run(root).get("memory", ()))
    if evaluation.subject in memories:  # else it is the bank of all
        memories = {evaluation.subject: memories[evaluation.subject]}
    corpora: dict[str | None, Path] = {}
    for name, directory in memories.items():
        memory = Path(directory)
        manifest = memory / "manifest.json"
        if not manifest.is_file() or sha256_of_file(manifest) != report.inputs.get(name):
            raise UserError(
                f"--reports {root}: {name}, {memory}, is not there as it was evaluated, so the text of its"
                " training is not known: evaluate it again, as an output of launch/train.py"
            )
        sha256 = read_memory_description(memory / "weights" / "config.json").provenance.corpus
        corpus = find_input(memory, "corpus", sha256, given=Path(evaluation.corpus))
        if corpus is None:
            raise UserError(
                f"--reports {root}: the text that {name} was trained on is not found, so what the base read"
                f" for it is not known: put its corpus where it was, or as `corpus` next to {memory}"
            )
        corpora[sha256] = corpus
    return sum(num_tokens_of_splits(corpus, flag="--reports")["train"] for corpus in corpora.values())


def drawn_losses(points: Sequence[Point]) -> Array:
    """[R, P]: the losses of each point for draws of whole documents, the same ones for all points."""
    counts_RM = draw_documents(len(points[0].positions_M), NUM_DRAWS)
    columns = [-(counts_RM @ point.sums_M) / (counts_RM @ point.positions_M) for point in points]
    losses_RP: Array = np.stack(columns, axis=1)
    return losses_RP
