"""Part of `train`: the objectives of a memory by name (`--objective`).

How one is added, in four files and a test (CONTRIBUTING.md has one as an example):

1. A file next to imitation.py, with a frozen class that has the members of `MemoryObjective` below. Its
   module's forward is the loss, because under ZeRO-3 a weight is whole only inside the forward of the module
   that owns it; the module's state dict has the names of a plain `Memory`, or the result cannot be exported.
2. This file: a word in `OBJECTIVES`.
3. config.py: the word in `objective`'s type, and a field for each number of its own.
4. `__init__.py`: its line in the map of the folder.
5. A test, in tests/stages/training/: the loss of a batch against a dense formula.

A batch brings the inputs and the labels, and what the objective says that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.imitation import Imitation
from mlpmem_ds.stages.training.joined import Joined
from mlpmem_ds.stages.training.parts import Objective


class MemoryObjective(Objective, Protocol):
    """An objective over the positions of a corpus; a micro-batch is a `formats.training_rows.MicroBatch`."""

    @property
    def needs_targets(self) -> bool:
        """Whether a batch brings the retriever's distributions."""

    @property
    def needs_base_log_probabilities(self) -> bool:
        """Whether a batch brings the base's log-probability of each label."""

    @property
    def needs_base_end(self) -> bool:
        """Whether its module, a `models.objective.MemoryWithLoss`, is given the base's norm and head."""


OBJECTIVES: Mapping[str, Callable[[Config, MemoryConfig], MemoryObjective]] = {
    "imitation": Imitation.of,
    "helpful": Imitation.of,
    "joined": Joined.of,
}
