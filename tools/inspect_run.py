#!/usr/bin/env python3
"""What is in a run directory, whether it is complete, and whether every checksum holds."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.inspection import inspect_run


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        inspect_run.Config,
        inspect_run.run,
        argv=argv,
        description=(
            "Look at a run directory (or one stage's): what is there, complete or not, every checksum. "
            "Exit code 2 where something is damaged."
        ),
        example="python tools/inspect_run.py run",
    )


if __name__ == "__main__":
    sys.exit(main())
