"""Forks the ranks of trainings: a start costs a fraction of a second, not 10 s.

Run by the fixture `forked_training` in a fork that has imported DeepSpeed (warm_server.py): a line of JSON
with steps in, a line with their results and what each said out. With a file of jobs as its argument it is one
rank of a launcher's, and runs them one after another.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import typing
from pathlib import Path

import torch

from mlpmem_ds.core.errors import LOST_RANK, REFUSED, UserError
from mlpmem_ds.core.faults import is_lost_rank
from mlpmem_ds.core.log import set_up_logging
from mlpmem_ds.core.world import World, world_from_environment
from mlpmem_ds.engines import device_peak
from mlpmem_ds.engines.deepspeed import engine
from mlpmem_ds.stages.base import train_base
from mlpmem_ds.stages.baseline import train_baseline
from mlpmem_ds.stages.training import curves, train
from mlpmem_ds.stages.training.metrics import Metrics

STAGES = {"train": train, "train_base": train_base, "train_baseline": train_baseline}
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")


def watch_saving(note, deadly):
    """Count the operations on the files of a checkpoint in the making, before each is done.

    As Python's audit sees them, and torch.save, which it does not see. They are written to `note`; before
    number `deadly` this process is killed.
    """
    count, save = 0, torch.save

    def count_one(name):
        nonlocal count
        count += 1
        if count == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if note is not None:
            os.write(note, (name + "\n").encode())

    def audit(event, arguments):
        if event in FILE_EVENTS and isinstance(arguments[0], str | Path):
            path = str(arguments[0])
            is_saved = "/checkpoints/" in path and (".tmp" in path or event == "shutil.rmtree")
            if is_saved or "latest.json" in path:
                count_one(event)

    def watched_save(*arguments, **more):
        count_one("torch.save")
        save(*arguments, **more)
        count_one("saved")

    torch.save = watched_save
    sys.addaudithook(audit)


def signal_after(path, num_lines):
    """SIGTERM to this process when a file has so many lines."""

    def watch():
        while not path.exists() or path.read_text().count("\n") < num_lines:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def kill_at_metrics(step):
    """Kill this process when it has written the metrics of a step."""
    write = Metrics.write

    def write_and_die(self, written_step, values):
        write(self, written_step, values)
        if written_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Metrics.write = write_and_die


def config_of(job, stage="train"):
    """The Config of a job, whose paths are text."""
    hints = typing.get_type_hints(STAGES[stage].Config)
    is_path = {name: Path in (hint, *typing.get_args(hint)) for name, hint in hints.items()}
    return STAGES[stage].Config(
        **{name: Path(value) if is_path[name] else value for name, value in job.items()}
    )


def run_rank(
    job,
    world,
    *,
    stage="train",
    bytes_of_a_file=None,
    bytes_of_weights=None,
    signal_at=None,
    kill_at=None,
    draw=False,
    note=None,
    deadly=None,
):
    """A rank's exit code. The curves, which take half of the time, are drawn if told."""
    set_up_logging(world, name="train")
    device_peak._SIZES["cpu"] = 64
    try:
        if not draw:
            curves.save_png = lambda figure, path, **_: path.write_bytes(b"")
        if world.rank == 0 and (note, deadly) != (None, None):
            watch_saving(note, deadly)
        if bytes_of_a_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, bytes_of_a_file))
        if bytes_of_weights is not None:
            engine.MAX_WEIGHTS_BYTES = bytes_of_weights
        config = config_of(job, stage)
        if signal_at is not None and world.rank == world.size - 1:
            signal_after(config.output / "metrics.jsonl", signal_at)
        if kill_at is not None:
            kill_at_metrics(kill_at)
        STAGES[stage].run(config, world)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return LOST_RANK if is_lost_rank(error) else REFUSED
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(job, size=1, **more):
    """Fork the ranks; their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = run_rank(job, World(rank=rank, size=size, local_rank=rank), **more)
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    return pids


def join(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def ended(pids):
    """The exit codes. A rank whose peer died before they met would wait for it: after 1 s it is killed, as
    launchers do."""
    codes, deadline = {}, time.monotonic() + 1
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return codes


def undisturbed(job):
    return {**job, "output": job["output"] + "-undisturbed"}


def killed(job, size, kills, seed):
    """Kill one rank or all at random moments, start again, until so many kills have hit; then let it
    complete.

    The last kill comes at the first checkpoint where no random one came between that and the end.
    """
    generator, hits, is_resumed = random.Random(seed), 0, False
    output = Path(job["output"])
    pointer = output / "latest.json"
    begin = time.monotonic()
    assert join(start(undisturbed(job), size)) == [0] * size
    duration = time.monotonic() - begin
    while hits < kills:
        pids = start(job, size)
        victims = pids if generator.random() < 0.5 else [generator.choice(pids)]
        moment = time.monotonic() + generator.uniform(0.2, 1) * duration
        is_placed = hits == kills - 1 and not is_resumed
        while time.monotonic() < (moment + 10 * duration if is_placed else moment):
            if is_placed and pointer.exists():
                break
            time.sleep(0.001)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        codes = ended(pids)
        hits += any(codes[pid] == -signal.SIGKILL for pid in victims)
        if (output / "manifest.json").exists():
            shutil.rmtree(output)
        is_resumed |= pointer.exists()
    assert join(start(job, size)) == [0] * size
    return {"hits": hits}


def killed_while_saving(job, kills):
    """Kill before one after another of the operations on checkpoints that an undisturbed start does; then let
    it complete."""
    reader, writer = os.pipe()
    assert join(start(undisturbed(job), note=writer)) == [0]
    os.close(writer)
    with os.fdopen(reader) as stream:
        operations = stream.read().split()
    kinds = {operations.index(name) for name in operations}
    places = sorted(kinds | {number * len(operations) // kills for number in range(kills)})
    for place in places:
        if join(start(job, deadly=1 + place)) == [0]:  # there was less left to do
            shutil.rmtree(job["output"])
            assert join(start(job, deadly=1 + place)) == [-signal.SIGKILL]
    assert join(start(job)) == [0]
    return {"killed_before": [operations[place] for place in places]}


def run_as_a_rank(path):
    """Run the jobs of a file; a launcher started this rank and tells it so in the environment."""
    world = world_from_environment(os.environ)
    for step in json.loads(path.read_text()):
        code = run_rank(step["job"], world, stage=step["stage"])
        if code:
            sys.exit(code)


def main():
    if len(sys.argv) > 1:
        run_as_a_rank(Path(sys.argv[1]))
        return
    answers = os.fdopen(os.dup(1), "w")
    own_errors = os.dup(2)
    os.dup2(2, 1)
    functions = {"killed": killed, "killed_while_saving": killed_while_saving}
    for line in sys.stdin:
        results, said = [], []
        for words in json.loads(line):
            kind = words.pop("kind")
            with tempfile.TemporaryFile("w+") as log:
                os.dup2(log.fileno(), 2)
                results.append(functions[kind](**words) if kind in functions else join(start(**words)))
                os.dup2(own_errors, 2)
                log.seek(0)
                said.append(log.read())
        answers.write(json.dumps([results, said]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
