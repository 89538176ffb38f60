#!/usr/bin/env python3
"""Ask an exported model questions through the lm-evaluation-harness, without and with its memory."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.harness import run_lm_eval


def run(config: run_lm_eval.Config, world: World) -> None:
    print(run_lm_eval.run(config, world))


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        run_lm_eval.Config,
        run,
        argv=argv,
        description=(
            "Exact match on questions and accuracy on ranked choices, of the base (λ = 0) and with the"
            " memory."
        ),
        example=(
            "python tools/run_lm_eval.py --model run/export --questions nq_open.jsonl --lambdas 0 0.5 --limit"
            " 1000"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
