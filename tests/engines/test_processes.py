"""Where ranks meet, under every launcher."""

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.processes import meeting_point


def test_ranks_agree_where_to_meet():
    world = World(rank=1, size=2, local_rank=1)
    one_host = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "job@1"}
    assert meeting_point(world, one_host) == meeting_point(World(rank=0, size=2), one_host)
    assert meeting_point(world, {"MASTER_ADDR": "there", "MASTER_PORT": "7"}) == ("there", 7)
    assert meeting_point(World(), {})[0] == "127.0.0.1"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        meeting_point(world, {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
