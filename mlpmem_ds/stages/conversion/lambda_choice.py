"""Part of `convert_checkpoint` and `generate`: the weight λ of a memory, and how it was chosen, in words."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.evaluation import Evaluation, Report, open_report
from mlpmem_ds.formats.gates import FittedGate
from mlpmem_ds.formats.trained_models import TrainedMemory
from mlpmem_ds.models.memory_config import DEFAULT_LAMBDA
from mlpmem_ds.models.mixture import share_of_all

_logger = logging.getLogger(__name__)


def read_report(
    path: Path | None, memories: Sequence[tuple[TrainedMemory, Path]]
) -> tuple[Report | None, tuple[float, str] | None]:
    """The report of --report, and the λ that it has for the memory, with how it was chosen in words.

    Args:
        path: the flag; None: it was not given, and there is neither.
        memories: each with its directory, for messages; of several no report chooses one λ.

    Raises:
        UserError: the report does not evaluate one of them, or evaluates it without a λ.
    """
    if path is None:
        return None, None
    report, chosen = open_report(path), list[float]()
    for trained, root in memories:
        names = [name for name, value in report.inputs.items() if value == trained.sha256]
        found = [arm.lmbda for arm in report.evaluation.arms if arm.name in names]
        if not found or found[0] is None:
            raise UserError(
                f"--report {path} does not evaluate the memory of --checkpoint {root}: run "
                "launch/evaluate.py with that memory, or leave out --report and give --lambda"
            )
        chosen.append(float(found[0]))
    return report, (chosen[0], _rule_of(report.evaluation)) if len(chosen) == 1 else None


def _rule_of(evaluation: Evaluation) -> str:
    if evaluation.choices_from is not None:
        return "chosen in another report"
    return "least perplexity on the tuning split"


def choose_lambda(
    given: float | None, reported: tuple[float, str] | None = None, gate: FittedGate | None = None
) -> tuple[float, str]:
    """λ in [0, 1], from the first that says it, and in words how it was chosen.

    Args:
        given: the flag.
        reported: what a report has, as `read_report` gives it.
        gate: its best fixed weight, in all.
    """
    if given is not None:
        return float(given), "given as a flag"
    if reported is not None:
        if reported[0] == 0 and gate is None:
            _logger.warning(
                "the report chose λ = 0: the memory does not help this base, and the export is the base alone"
            )
        return reported
    if gate is not None:
        return share_of_all(gate.manifest.fixed), "the best fixed weight of the gate's texts"
    _logger.warning(
        "no λ was given: it is %g, which was not tuned; it can be changed at any time", DEFAULT_LAMBDA
    )
    return DEFAULT_LAMBDA, "the default, not tuned"
