"""A host is cut off, or its rank killed, in the middle of each stage: the other stops and says which host it
was, and the same command then gives the undisturbed bytes."""

import signal
import time

import pytest

from . import pipeline
from .launchers import Job, complete
from .warm import on_each_host

pytestmark = pytest.mark.cluster
STAGES = ("base", "keys", "index", "targets", "memory", "report")
SECONDS_TO_STOP = 60.0
PATIENCE = 120.0
RANK_TIMEOUT = ["--rank-timeout-seconds", "8"]
CASES = [(stage, fault) for stage in STAGES for fault in ("cut", "killed")]
QUICK = [("targets", "cut"), ("memory", "killed")]


@pytest.mark.parametrize(
    ("stage", "fault"), [pytest.param(*case, marks=[pytest.mark.quick] * (case in QUICK)) for case in CASES]
)
def test_a_lost_host_stops_the_run_which_then_continues(
    warm_hosts, undisturbed, new_run, orphans, stage, fault
):
    run, words = new_run(stage), [*pipeline.stage_named(stage).words, *RANK_TIMEOUT]
    job = Job(on_each_host(warm_hosts, words), run, run.with_name(f"{run.name}.log"))
    stop_in_the_middle(job, warm_hosts, run / stage)
    survivor, lost = warm_hosts
    if fault == "cut":
        lost.host.cut()
    else:
        lost.kill_ranks()
    continue_ranks(warm_hosts)
    began = time.monotonic()
    try:
        codes = job.wait(PATIENCE)
        seconds = time.monotonic() - began
    finally:
        lost.host.mend()
        for host in warm_hosts:
            host.kill_ranks()
    print(f"{stage} {fault}: exit codes {codes} after {seconds:.0f} s")
    assert 0 not in codes, job.said()
    assert seconds < SECONDS_TO_STOP, job.said()
    assert lost.host.name in job.said(0) and "Traceback" not in job.said(), job.said()
    if fault == "cut":
        assert survivor.host.name in job.said(1)
    complete(on_each_host(warm_hosts, words), run)
    assert pipeline.differences(run, undisturbed, stage) == []
    assert pipeline.leftovers(run) == [] and orphans() == []


def stop_in_the_middle(job, warm_hosts, output):
    """Hold both ranks where they are when the stage has begun to make something."""
    deadline = time.monotonic() + PATIENCE
    while not (ranks := [host.ranks() for host in warm_hosts]) or not all(ranks):
        assert time.monotonic() < deadline and job.are_running(), job.said()
        time.sleep(0.01)
    while not has_begun(output):
        assert time.monotonic() < deadline and job.are_running(), job.said()
        time.sleep(0.001)
    for rank in sum(ranks, []):
        rank.send(signal.SIGSTOP)
    assert not pipeline.is_complete(output.parent, output.name), f"{output.name} was too fast to be stopped"


def continue_ranks(warm_hosts):
    for host in warm_hosts:
        for rank in host.ranks():
            rank.send(signal.SIGCONT)


def has_begun(output):
    """A unit has its record, or a training its first step."""
    metrics = output / "metrics.jsonl"
    return any(output.glob("done/**/*.json")) or (metrics.exists() and metrics.stat().st_size > 0)
