#!/usr/bin/env python3
"""Base, retriever, memory and controls on unseen text → one table."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.evaluation import evaluate


def run(config: evaluate.Config, world: World) -> None:
    table = evaluate.run(config, world)
    if table:
        print(table)


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        evaluate.Config,
        run,
        argv=argv,
        description=(
            "Score the base, kNN, memories and controls on unseen text; choose λ on the tuning split, report"
            " the test."
        ),
        example=(
            "python launch/evaluate.py --model run/base --corpus run/corpus --output run/report --memory"
            " run/memory --keys run/keys --index run/index --targets run/targets --control"
            " base+memory_ce_only=run/ce_only base_trained_on=run/base_trained_on"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
