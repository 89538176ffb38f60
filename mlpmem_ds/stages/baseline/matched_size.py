"""Part of `train_baseline`: how many parameters the memory has that is compared with."""

from __future__ import annotations

from mlpmem_ds.stages.baseline.config import Config
from mlpmem_ds.stages.training.initial_memory import open_initial_memory


def matched_parameters(config: Config) -> int | None:
    """The parameters of --match-memory, an own head included, or --match-parameters; None with neither.

    Raises:
        UserError: there is no finished memory, or an export of several.
    """
    if config.match_memory is None:
        return config.match_parameters
    return open_initial_memory(config.match_memory, flag="--match-memory").memory.num_parameters()
