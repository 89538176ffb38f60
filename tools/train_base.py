#!/usr/bin/env python3
"""Corpus → a small base trained from scratch, or an existing base trained on."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.base import train_base


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        train_base.Config,
        train_base.run,
        argv=argv,
        description=(
            "Train a GPT-2-like language model on a corpus, or train an existing model on; any number of"
            " ranks."
        ),
        example=(
            "torchrun --nproc-per-node 2 tools/train_base.py --corpus run/corpus --output run/base --epochs 8"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
