"""Ranks that build an index together: `forked_index.py KEYS OUTPUT HOW SIZE`, each a fork."""

import os
import sys
from pathlib import Path

from mlpmem_ds.core.world import World
from mlpmem_ds.stages.index import build_index


def main() -> None:
    keys, output, how, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    config = build_index.Config(
        keys=keys,
        output=output,
        factory="IVF8,PQ4",
        num_shards=3,
        exchange=how,  # type: ignore[arg-type]
    )
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            build_index.run(config, World(rank=rank, size=size, local_rank=rank))
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main()
