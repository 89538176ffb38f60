"""How the ranks of a stage are connected: its output is looked at first.

So nothing is made in a directory that is not the stage's.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from mlpmem_ds.core.run_description import check_output
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.opening import Exchange, open_ranks
from mlpmem_ds.engines.collectives.ranks import Ranks


class StageConfig(Protocol):
    """The flags that say how the ranks of a stage are connected, and what they write."""

    @property
    def output(self) -> Path: ...
    @property
    def exchange(self) -> Exchange: ...
    @property
    def rank_timeout_seconds(self) -> float: ...


def open_stage_ranks(
    config: StageConfig, world: World, *, stage: str, leftovers: Collection[str] = ()
) -> Ranks:
    """The ranks that write this output together; called by all of them.

    Args:
        config: of the stage.
        world: rank and size.
        stage: format name, such as "keys".
        leftovers: names that may be in an output that is none yet.

    Raises:
        UserError: the output holds something else, or the ranks cannot be connected in this way.
    """
    check_output(config.output, stage=stage, leftovers=leftovers)
    return open_ranks(
        world,
        config.exchange,
        os.environ,
        folder=exchange_folder(config.output),
        timeout_seconds=config.rank_timeout_seconds,
    )


def exchange_folder(output: Path) -> Path:
    """Where ranks that exchange files (`--exchange files`) do so; it goes when they leave."""
    return output / ".exchange"
