#!/usr/bin/env python3
"""What a run will need: bytes, hours, GPUs and memory, stage by stage."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.planning import plan


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        plan.Config,
        lambda config, world: sys.stdout.write(plan.table(plan.run(config, world))),
        argv=argv,
        description=(
            "Say what a run will need before it starts: bytes, time, memory and GPU hours of every stage."
        ),
        example="python tools/plan.py --positions 1000000000 --model Qwen/Qwen2.5-1.5B --gpus 8 --ranks 8",
    )


if __name__ == "__main__":
    sys.exit(main())
