"""The steps of the GPU check, and how one of them runs: in a process of its own, which may be ended.

`python -m mlpmem_ds.benchmarks.gpu_check.steps NAME WORK GPUS full|rehearsal`
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mlpmem_ds.benchmarks.gpu_check.figures import Reporter
from mlpmem_ds.benchmarks.gpu_check.sizes import Sizes, full_sizes, rehearsal_sizes
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a step gets.

    Attributes:
        work: directory of all steps; what one leaves, a later one may read.
        num_gpus: of `--gpus`; in a rehearsal as many ranks on the CPU.
    """

    sizes: Sizes
    work: Path
    num_gpus: int
    report: Reporter

    @property
    def device(self) -> torch.device:
        """The first GPU; in a rehearsal the CPU."""
        return device_of_rank("auto", World())


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: `function` is "module:name" below this package, loaded when the step runs."""

    name: str
    function: str
    max_seconds: float
    meaning: str
    num_gpus: int = 1
    """it needs at least so many"""

    def load(self) -> Callable[[Context], None]:
        module, _, name = self.function.partition(":")
        function: Callable[[Context], None] = getattr(
            importlib.import_module(f"mlpmem_ds.benchmarks.gpu_check.{module}"), name
        )
        return function


STEPS = (
    Step(name="machine", function="machine:describe", max_seconds=30, meaning="GPUs, versions, disk"),
    Step(
        name="twins",
        function="machine:test_maths",
        max_seconds=75,
        meaning="kernels and search against their originals, in the main thread and in a fresh one",
    ),
    Step(
        name="libraries",
        function="machine:test_libraries",
        max_seconds=60,
        meaning="the other tests that need a GPU, and optional libraries that are installed",
    ),
    Step(
        name="loss",
        function="kernels:measure_loss",
        max_seconds=60,
        meaning="the head's loss, forward and backward",
    ),
    Step(
        name="search",
        function="kernels:measure_search",
        max_seconds=120,
        meaning="exact search, and search in lists",
    ),
    Step(
        name="assign",
        function="kernels:measure_assignment",
        max_seconds=60,
        meaning="nearest of many centroids",
    ),
    Step(
        name="extract",
        function="pipeline:measure_extraction",
        max_seconds=120,
        meaning="extract-keys with a base of 1.5e9 random parameters, against its forward pass alone",
    ),
    Step(
        name="train",
        function="pipeline:measure_training",
        max_seconds=200,
        meaning="train of a memory of 1e9 parameters with ZeRO 1, 2 and 3",
    ),
    Step(
        name="checkpoint",
        function="pipeline:check_checkpoint",
        max_seconds=100,
        meaning="text to export: a training is stopped, resumed and converted",
    ),
    Step(
        name="generate",
        function="pipeline:check_generation",
        max_seconds=75,
        meaning="generate with a static cache and the mixture's kernel",
    ),
    Step(
        name="keys_of_ranks",
        function="ranks:check_keys",
        max_seconds=120,
        meaning="extract-keys: a rank a GPU, the same bytes as one rank",
        num_gpus=2,
    ),
    Step(
        name="index_of_ranks",
        function="ranks:check_index",
        max_seconds=120,
        meaning="build-index: the same",
        num_gpus=2,
    ),
    Step(
        name="targets_of_ranks",
        function="ranks:check_targets",
        max_seconds=180,
        meaning="write-targets through the index: the same",
        num_gpus=2,
    ),
    Step(
        name="train_of_ranks",
        function="ranks:check_training",
        max_seconds=240,
        meaning="train with ZeRO 1, 2 and 3: a rank a GPU, the loss of one rank",
        num_gpus=2,
    ),
)


def steps_for(num_gpus: int) -> list[Step]:
    """Those that so many GPUs can do."""
    return [step for step in STEPS if step.num_gpus <= num_gpus]


def figures_path(work: Path, name: str) -> Path:
    """Where a step reports."""
    return work / f"{name}.figures.jsonl"


def run_step(step: Step, work: Path, *, num_gpus: int, is_rehearsal: bool) -> None:
    """Do one step in this process."""
    context = Context(
        sizes=rehearsal_sizes() if is_rehearsal else full_sizes(),
        work=work,
        num_gpus=num_gpus,
        report=Reporter(figures_path(work, step.name), is_rehearsal=is_rehearsal),
    )
    step.load()(context)


def main(argv: Sequence[str]) -> int:
    """The step's own process."""
    name, work, num_gpus, size = argv
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    (step,) = [step for step in STEPS if step.name == name]
    run_step(step, Path(work), num_gpus=int(num_gpus), is_rehearsal=size == "rehearsal")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
