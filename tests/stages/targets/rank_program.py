"""`write_targets` by several ranks, for the tests: `rank_program.py HOW SIZE CONFIG KILLED CALL`.

CONFIG is a pickled Config; the rank KILLED (-1: none) ends without a word after so many calls. Started once
for all ranks, which it forks; under mpirun once for each. The exit code is the worst of
ranks that were not killed.
"""

import atexit
import dataclasses
import os
import pickle
import sys
from pathlib import Path

from mlpmem_ds.core import files
from mlpmem_ds.core.errors import LOST_RANK, REFUSED, LostRankError, UserError
from mlpmem_ds.core.world import World, world_from_environment
from mlpmem_ds.stages.retrieval import list_owners
from mlpmem_ds.stages.targets import units, write_targets

TIMEOUT_SECONDS = 2.0
_POSITIONS_OF_ALL = 48


def run(world: World, config: write_targets.Config, killed: int, call: int) -> int:
    list_owners._CALL_QUERIES = _POSITIONS_OF_ALL  # several calls a shard
    config = dataclasses.replace(config, rank_timeout_seconds=TIMEOUT_SECONDS)
    if world.rank == killed:
        original, count = units.ShardWriter._found, 0

        def found(self, calls):
            nonlocal count
            for searched in original(self, calls):
                count += 1
                if count == call:
                    os._exit(9)
                yield searched

        units.ShardWriter._found = found
    hashed, sha256_of_file = [], files.sha256_of_file

    def noted(path: Path) -> str:
        hashed.append(str(path))
        return sha256_of_file(path)

    files.sha256_of_file = noted
    atexit.register(lambda: config.output.with_suffix(f".hashed-{world.rank}").write_text("\n".join(hashed)))
    try:
        write_targets.run(config, world)
    except UserError as error:
        print(error, file=sys.stderr)
        return LOST_RANK if isinstance(error, LostRankError) else REFUSED
    return 0


def main() -> None:
    how, size, killed, call = sys.argv[1], int(sys.argv[2]), int(sys.argv[4]), int(sys.argv[5])
    config = pickle.loads(Path(sys.argv[3]).read_bytes())
    if how in ("mpi", "auto"):
        world = world_from_environment(os.environ)
        assert world.size == size
        sys.exit(run(world, config, killed, call))
    children = {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = run(World(rank=rank, size=size, local_rank=rank), config, killed, call)
            sys.stderr.flush()
            atexit._run_exitfuncs()
            os._exit(code)
        children[child] = rank
    codes = {rank: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, rank in children.items()}
    sys.exit(max(code for rank, code in codes.items() if rank != killed))


if __name__ == "__main__":
    main()
