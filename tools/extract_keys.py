#!/usr/bin/env python3
"""Corpus → keys: the frozen base's hidden states, compact, on any number of ranks."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.keys import extract_keys


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        extract_keys.Config,
        extract_keys.run,
        argv=argv,
        description=(
            "Run a frozen causal LM over a corpus and store each position's key, value, log-probability and "
            "memory input. Start it under torchrun, mpirun, srun or deepspeed to share the work."
        ),
        example=(
            "torchrun --nproc-per-node 2 tools/extract_keys.py --model run/base --corpus run/corpus --output"
            " run/keys"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
