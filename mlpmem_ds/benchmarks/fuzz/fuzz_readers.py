"""`fuzz_readers`: files of every kind are damaged. Exit code 0: no failure; 1: some; 2: a wrong flag."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from mlpmem_ds.benchmarks.fuzz.config import Config
from mlpmem_ds.core.front_end import run_front_end, seldom_collected
from mlpmem_ds.core.world import World


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Read the flags, try the inputs, write the report; the exit code."""
    is_good = True

    def run(config: Config, world: World) -> str:
        nonlocal is_good
        with seldom_collected():
            trials = importlib.import_module("mlpmem_ds.benchmarks.fuzz.trials")
        text, is_good = trials.run(config, world)
        return str(text)

    code = run_front_end(Config, run, argv=argv, prog=prog)
    return code or int(not is_good)
