"""Read and write eval.json: everything that `evaluate` found, as records. See README.md.

`evaluate` makes one, the report's page and plots show it, an export takes its λ and its model card from it.
Perplexities are `exp` of a mean in nats; a change is relative (-0.05: five per cent less perplexity), its
interval holds 95 % of the bootstrap's resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlpmem_ds.core.array_files import read_array
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_array, publish_json, read_json
from mlpmem_ds.core.manifest import CompleteStage, Manifest, read_stage
from mlpmem_ds.core.typed_json import added_later, from_json, json_key, to_json
from mlpmem_ds.formats.gates import WeightFigures

FORMAT, VERSION = "report", 1
EVALUATION_NAME = "eval.json"


@dataclass(frozen=True, kw_only=True)
class SplitFigures:
    """An arm on one split, at the λ that was chosen on the tuning split, or taken from another report."""

    ppl: float
    bits_per_byte: float
    """bits spent on all positions, by byte of the text"""
    ppl_change: float | None
    """against the base; None, as the next two, for the base itself"""
    ppl_interval: tuple[float, float] | None
    win_rate: float | None
    """share of positions to which the arm's own distribution gives the token more than the base; ties half"""
    document_interval: tuple[float, float] | None = None
    """as `ppl_interval`, by drawing whole documents again; None also where there are fewer than 20"""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Perplexity of the tuning split at one λ; None where it is infinite."""

    lmbda: float = field(metadata=json_key("lambda"))
    ppl: float | None


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """The positions whose guess was given a probability in one bin."""

    positions: int
    probability: float
    """their mean"""
    correct: float
    """share of them whose guess was the token"""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How well the probability of one guess a position agrees with how often the guess is right."""

    error: float
    """expected calibration error"""
    bins: tuple[CalibrationBin, ...]
    """those that hold a position"""


@dataclass(frozen=True, kw_only=True)
class ArmFigures:
    """One arm: a way to predict, its quality and its price."""

    name: str
    description: str
    """what it is, in a sentence for the report"""
    ppl: float
    """of the test split, as the next four; `splits` has them for every split"""
    bits_per_byte: float
    ppl_change: float | None
    ppl_interval: tuple[float, float] | None
    win_rate: float | None
    splits: Mapping[str, SplitFigures]
    lmbda: float | None = field(metadata=json_key("lambda"))
    """its weight in the mixture with the base; None for an arm that stands alone"""
    chosen: Mapping[str, float]
    """what was chosen together with λ: neighbours and temperature of a kNN arm"""
    tried: Mapping[str, tuple[float, ...]]
    """from which values each was chosen"""
    parameters: int
    bytes: int
    """on disk, with the base's: weights, configuration, stored keys, index"""
    tokens: int | None
    """read to make it beyond the base, each time that they were read; None where it is not known"""
    seconds: float | None
    """that its stages took beyond the base; None where a log is missing"""
    tokens_per_second: float
    """scored, with the base's pass"""
    calibration: Calibration
    tuning_curve: tuple[CurvePoint, ...] | None
    settings: Mapping[str, Any]
    """what was set for this kind of arm: k, temperature, lists probed"""
    weights: Mapping[str, WeightFigures] | None
    """by split, of an arm whose λ a gate gives at each position, or of a bank; None for the others"""


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of test perplexity from one arm to another, paired by position."""

    ppl_change: float
    ppl_interval: tuple[float, float]
    """by drawing blocks of positions again"""
    document_interval: tuple[float, float] | None = None
    """by drawing whole documents again; None where there are fewer than 20"""


@dataclass(frozen=True, kw_only=True)
class GroupFigures:
    """An arm in each group of a breakdown; None where a group has no position.

    `won` and `lost` are sums of log(p_arm / p_base) over a group's positions where it is positive, or
    negative, divided by all positions of the split: over the groups they add up to the arm's gain.
    """

    ppl: tuple[float | None, ...]
    ppl_change: tuple[float | None, ...]
    win_rate: tuple[float | None, ...]
    won: tuple[float, ...]
    lost: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The test split's positions in groups."""

    name: str
    labels: tuple[str, ...]
    positions: tuple[int, ...]
    base_ppl: tuple[float | None, ...]
    arms: Mapping[str, GroupFigures]
    """all arms but the base"""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """An arm's speed with a datastore of so many keys; `keys` is None for an arm without a datastore."""

    arm: str
    keys: int | None
    positions: int
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A passage of the test split, continued by the base alone and by base and memory."""

    prompt: str
    base: str
    memory: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it was measured; `cores` None where the system does not say."""

    platform: str
    cores: int | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for all arms."""

    bootstrap_samples: int
    bootstrap_block: int
    """positions in a block that is drawn as one"""
    block_size: int
    """tokens in a window of context"""
    stride: int
    """tokens from one window to the next"""
    dtype: str
    device: str
    threads: int
    """of a process that scored"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that was found; the first arm is the base."""

    date: str
    machine: Machine
    model: str
    """the base, as the user named it"""
    corpus: str
    tuning_split: str
    test_split: str
    extra_splits: tuple[str, ...]
    tokens: Mapping[str, int]
    """positions of each split"""
    lambdas: tuple[float, ...]
    """of the curves; each arm's λ is the best of them, if it was chosen here"""
    settings: Settings
    subject: str | None
    """the arm that the others are compared with: the memory; None without one"""
    reference: str | None
    """the arm whose gain `recovered_share` is a share of: kNN over all keys; None without one"""
    arms: tuple[ArmFigures, ...]
    recovered_share: float | None
    """the subject's gain in test perplexity, as a share of the reference's"""
    against: Mapping[str, Change]
    """arm → the change from it to the subject"""
    wins: Mapping[str, bool]
    """control → whether the subject has the lower test perplexity"""
    breakdowns: tuple[Breakdown, ...]
    speeds: tuple[Speed, ...]
    samples: tuple[Sample, ...]
    choices_from: str | None = field(default=None, metadata=added_later())
    """the directory of the report whose λ and other choices were taken; None: they were made on the tuning
    split"""

    @property
    def base(self) -> ArmFigures:
        return self.arms[0]

    def arm(self, name: str) -> ArmFigures:
        """The arm of this name. Raises KeyError."""
        return {arm.name: arm for arm in self.arms}[name]


@dataclass(frozen=True, kw_only=True)
class DocumentSums:
    """What each arm spent on each of a split's M documents: enough for its perplexity, and for intervals that
    draw whole documents again."""

    positions_M: np.ndarray
    """int64: scored positions of each document"""
    sums: Mapping[str, np.ndarray]
    """arm → natural log-probabilities at its choice, summed by document, float64 [M]"""


@dataclass(frozen=True, kw_only=True)
class ReportManifest(Manifest):
    """What was compared; the figures are in eval.json, which is made anew by every run."""

    FORMAT: ClassVar[str] = FORMAT
    VERSION: ClassVar[int] = VERSION

    tokens: Mapping[str, int]
    """positions of each split"""
    arms: tuple[str, ...]
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class Report(CompleteStage[ReportManifest]):
    """A complete report directory. Among the `inputs`, a memory has the name of its arm."""

    @cached_property
    def evaluation(self) -> Evaluation:
        """eval.json, read when first asked for. Raises DamagedDataError as `read_evaluation`."""
        return read_evaluation(self.root)


def write_evaluation(root: Path, evaluation: Evaluation) -> None:
    """Publish eval.json in a report directory."""
    fields = {"format": f"mlpmem-{FORMAT}", "version": VERSION, **to_json(evaluation)}
    publish_json(root / EVALUATION_NAME, fields, seal=True)


def read_evaluation(root: Path) -> Evaluation:
    """Read the eval.json of a report directory.

    Raises:
        DamagedDataError: missing, of another version, or with a key too many or too few.
    """
    path = root / EVALUATION_NAME
    if not path.exists():
        raise DamagedDataError(f"{path} is missing: give a directory that launch/evaluate.py has completed")
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise DamagedDataError(f"{path} is damaged: not a JSON object; run evaluate again, it writes it anew")
    found = (fields.pop("format", None), fields.pop("version", None))
    if found != (f"mlpmem-{FORMAT}", VERSION):
        raise DamagedDataError(
            f"{path} is of {found[0]!r} version {found[1]}, this program reads mlpmem-{FORMAT} version"
            f" {VERSION}: run evaluate again, it writes it anew"
        )
    return from_json(Evaluation, fields, where=str(path), version=VERSION)


def write_document_sums(root: Path, split: str, documents: DocumentSums) -> None:
    """Publish `documents-SPLIT.npy`: the positions, then a row an arm, in the order of eval.json."""
    rows = [documents.positions_M.astype(np.float64), *documents.sums.values()]
    publish_array(root / f"documents-{split}.npy", np.stack(rows))


def read_document_sums(root: Path, split: str) -> DocumentSums:
    """Of a complete report.

    Raises:
        DamagedDataError: the file or eval.json is missing, or they do not fit each other.
    """
    arms, path = read_evaluation(root).arms, root / f"documents-{split}.npy"
    rows = read_array(path) if path.is_file() else np.empty((0, 0))
    if rows.ndim != 2 or len(rows) != 1 + len(arms):
        raise DamagedDataError(
            f"{path} is missing, or not of the arms in {EVALUATION_NAME}: run evaluate again, it writes both"
        )
    return DocumentSums(
        positions_M=rows[0].astype(np.int64),
        sums={arm.name: sums_M for arm, sums_M in zip(arms, rows[1:], strict=True)},
    )


def open_report(root: Path, *, flag: str = "--report") -> Report:
    """Open a complete report directory.

    Raises:
        UserError: missing, incomplete or of another kind.
        DamagedDataError: a file is missing or of another size.
    """
    return read_stage(Report, ReportManifest, root, flag=flag)
