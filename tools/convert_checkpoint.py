#!/usr/bin/env python3
"""A trained memory and its base → a Hugging Face directory."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.conversion import convert_checkpoint


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        convert_checkpoint.Config,
        convert_checkpoint.run,
        argv=argv,
        description=(
            "Join a memory with its base into a Hugging Face directory, and verify it by loading it again."
        ),
        example=(
            "python tools/convert_checkpoint.py --checkpoint run/memory --model run/base --report run/report "
            "--output run/export"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
