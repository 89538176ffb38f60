#!/usr/bin/env python3
"""Search each key's neighbours and write them as next-token distributions."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.targets import write_targets


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        write_targets.Config,
        write_targets.run,
        argv=argv,
        description=(
            "Search each key's neighbours among all keys and write them as sparse next-token distributions."
        ),
        example=(
            "mpirun -n 4 python tools/write_targets.py --keys RUN/keys --index RUN/index --output RUN/targets"
            " --k 1024"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
