#!/usr/bin/env python3
"""Train a memory with DeepSpeed; start it with deepspeed, torchrun, mpirun, srun, or as it is."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.training import train


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        train.Config,
        train.run,
        description="Train a memory on a retriever's targets.",
        example="deepspeed --num_accelerators 2 launch/train.py --ds_config ds_configs/zero3.json "
        "--corpus RUN/corpus --targets RUN/targets --output RUN/memory",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
