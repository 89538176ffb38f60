"""Part of `quality`: the trained arms by name, what the trainers are given and what the page says of them.

The flags that decide size and length are the preset's (presets.py), alike for all arms of a kind; here are
those in which the arms differ.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

SUBJECT = "memory"
"""the memory of the recommended recipe: --memory of evaluate, under a gate and in a bank"""
BASE, KNN, KNN_INDEX = "base", "base+knn_exact", "base+knn_ivfpq"
MEMORY, MEMORY_CE = f"base+{SUBJECT}", f"base+{SUBJECT}_ce"
PAPER, PAPER_CE = "base+paper", "base+paper_ce"
GATE, BANK = f"base+{SUBJECT}+gate", "base+bank+gate"
CONTINUED, ENSEMBLE, ENSEMBLE_GATE = "continued", "base+ensemble", "base+ensemble+gate"
SECOND_MODELS = (CONTINUED, "bigger")
"""what the base is mixed with in the ensemble: the first of these that is trained on the text"""
BEST_MEMORIES = (GATE, MEMORY)
"""the arm that stands for the memory in comparisons: the first that there is"""


@dataclass(frozen=True, kw_only=True)
class MemoryArm:
    """A memory: flags of `train`."""

    flags: tuple[str, ...]
    description: str
    """for the page: no capital at its start, no full stop at its end"""
    is_default: bool = False
    """it reads the final norm's output at three depths, and starts as the base where that was not trained on
    the text; else it reads what the paper published, and starts at random"""


@dataclass(frozen=True, kw_only=True)
class ModelArm:
    """A language model in place of the base: flags of `train_baseline`."""

    kind: str
    """its flag `--kind`"""
    flags: tuple[str, ...] = ()
    """all others"""
    description: str
    starts_as_base: bool = True
    """else at random"""
    is_of_equal_time: bool = False
    """it gets the seconds that the subject and its keys took"""
    matches_memory: bool = False
    """it has as many parameters more as the subject"""
    package: str | None = None
    """that it needs"""

    @property
    def is_possible(self) -> bool:
        """Whether its package is installed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


_BEST = ("--select", "best")
_PAPER = (*_BEST, "--recipe", "paper")
_AUTO = (*_BEST, "--objective", "auto")
_ALONE = (*_BEST, "--objective", "imitation", "--alpha", "0")
PAPER_INPUTS = ("--input-layer", "0.7", "--input-point", "ffn_input")
"""what memories of the published recipe read: flags of `extract_keys`"""
BASE_OUTPUTS = ("--input-layer", "0.33", "0.67", "-1", "--input-point", "final_norm")
"""what memories of the recommended recipe read"""

MEMORIES: Mapping[str, MemoryArm] = {
    SUBJECT: MemoryArm(
        flags=_AUTO,
        description=(
            "memory of **the recommended recipe**: three depths read, started as the base (at random on text"
            " that the base was itself trained on), what is minimized chosen by `--objective auto`"
        ),
        is_default=True,
    ),
    "memory_ce": MemoryArm(
        flags=_ALONE,
        description="memory of the recommended recipe without the retriever: cross entropy alone",
        is_default=True,
    ),
    "paper": MemoryArm(
        flags=_PAPER,
        description="memory by the published recipe: random start, .4 KL, .6 cross entropy",
    ),
    "paper_ce": MemoryArm(
        flags=(*_PAPER, "--alpha", "0"),
        description="the published recipe without the retriever",
    ),
    "paper_permuted": MemoryArm(
        flags=(*_PAPER, "--control", "permuted-targets"),
        description="the published recipe with the retriever's answers to other positions",
    ),
    "paper_random": MemoryArm(
        flags=(*_PAPER, "--control", "random-memory"),
        description="memory that was not trained",
    ),
}
_STOPPED_EARLY = "with early stopping, for at most"
MODELS: Mapping[str, ModelArm] = {
    CONTINUED: ModelArm(
        kind="continued",
        description=(
            f"the base fine-tuned on the same text, all weights, {_STOPPED_EARLY} the preset's epochs"
        ),
    ),
    "continued_equal_time": ModelArm(
        kind="continued",
        flags=(
            *("--early-stopping-patience", "none", "--select", "best"),
            *("--schedule", "constant", "--epochs", "1000", "--warmup-fraction", "0.0005"),
        ),
        description=(
            "the base fine-tuned for the seconds of the memory and its keys, at a constant rate: how many"
            " steps fit is not known beforehand"
        ),
        is_of_equal_time=True,
    ),
    "lora": ModelArm(
        kind="lora",
        description=(
            "low-rank matrices of as many parameters as the memory (peft),"
            f" {_STOPPED_EARLY} the preset's epochs"
        ),
        matches_memory=True,
        package="peft",
    ),
    "bigger": ModelArm(
        kind="bigger",
        description=(
            "a decoder of the size of base and memory together, from scratch on this text,"
            f" {_STOPPED_EARLY} the epochs of both"
        ),
        starts_as_base=False,
        matches_memory=True,
    ),
}
_UNTRAINED = {
    BASE: "the frozen language model alone",
    KNN: "kNN-LM: the base mixed with a search of all keys; k, temperature and λ tuned",
    KNN_INDEX: "the same by an IVF-PQ index",
    GATE: "`base+memory` with a gate: λ of each token, fitted to tuning splits of both texts",
    ENSEMBLE: "the base mixed with a second language model: `continued`, else `bigger`; λ tuned",
    ENSEMBLE_GATE: (
        "`base+ensemble` with a gate fitted as the memory's is, of the same features: whether a model that"
        " forgets can be gated too, at the cost of a whole second model at every token"
    ),
    BANK: "both texts' memories at once under one gate",
}


def description_of(name: str) -> str:
    """Of an arm by its name in the report: `base`, `base+NAME` or NAME. Raises KeyError."""
    if name in _UNTRAINED:
        return _UNTRAINED[name]
    arm = name.removeprefix("base+")
    description = MODELS[arm].description if arm in MODELS else MEMORIES[arm].description
    return description if arm in MODELS else f"the base mixed with a {description}".replace("a the", "the")
