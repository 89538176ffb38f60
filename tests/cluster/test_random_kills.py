"""The whole pipeline over two hosts, killed at random ten times in a row, and started again each time."""

import random
import shutil
import time

import pytest

from . import pipeline
from .launchers import Job
from .warm import on_each_host, on_one_host

pytestmark = pytest.mark.cluster
KILLS, SEED = 10, 17
SHARE_OF_STARTS_KILLED = 0.8
SECONDS_UNTIL_THE_LAUNCHER_KILLS = 5.0
PATIENCE = 300.0


def test_ten_kills_in_a_row_leave_the_undisturbed_run(
    warm_hosts, undisturbed, seconds_of_stage, new_run, orphans
):
    run, generator, kills = new_run("corpus"), random.Random(SEED), []
    while (stage := first_missing(run)) or len(kills) < KILLS:
        if stage is None:  # all was made between the kills: make a part again
            make_again_from(generator.choice(pipeline.stages()), run)
            continue
        starts = on_one_host(warm_hosts[0], stage.words)
        if stage.name not in pipeline.ALONE:
            starts = on_each_host(warm_hosts, stage.words)
        number, job = len(kills), Job(starts, run, run.with_name(f"{run.name}.log"))
        if len(kills) < KILLS and generator.random() < SHARE_OF_STARTS_KILLED:
            time.sleep(generator.uniform(0, seconds_of_stage[stage.name]))
            if job.are_running():
                kills.append((stage.name, strike(warm_hosts, generator)))
                end_as_a_launcher_does(job, warm_hosts)
        was_killed = len(kills) > number
        codes = job.wait(PATIENCE)
        assert was_killed or set(codes) == {0}, job.said()
        assert orphans() == []
    print(f"kills: {kills}")
    for stage in pipeline.stages():
        assert pipeline.differences(run, undisturbed, stage.name) == []
    assert pipeline.leftovers(run) == []


def first_missing(run):
    return next((stage for stage in pipeline.stages() if not pipeline.is_complete(run, stage.name)), None)


def make_again_from(first, run):
    names = [stage.name for stage in pipeline.stages()]
    for name in names[names.index(first.name) :]:
        shutil.rmtree(run / name)


def strike(warm_hosts, generator):
    """Kill one host's ranks, those of all, or switch the second host off; what was done, in words."""
    kind = generator.choice(("one", "one", "all", "power"))
    if kind == "power":
        warm_hosts[1].host.power_off()
        return "node2 off"
    victims = warm_hosts if kind == "all" else [generator.choice(warm_hosts)]
    for host in victims:
        host.kill_ranks()
    return " ".join(host.host.name for host in victims)


def end_as_a_launcher_does(job, warm_hosts):
    """torchrun and srun end the other ranks when one has died; then the machine that was lost is back."""
    deadline = time.monotonic() + SECONDS_UNTIL_THE_LAUNCHER_KILLS
    while job.some_run() and time.monotonic() < deadline:
        time.sleep(0.05)
    for host in warm_hosts:
        if host.host.is_on:
            host.kill_ranks()
        else:
            host.power_on()
