#!/usr/bin/env python3
"""Build a sharded IVF-PQ index over a key directory."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.index import build_index


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        build_index.Config,
        build_index.run,
        argv=argv,
        description="Build a sharded inverted-file index (faiss) over a key directory.",
        example="mpirun -n 4 python tools/build_index.py --keys RUN/keys --output RUN/index",
    )


if __name__ == "__main__":
    sys.exit(main())
