"""Benchmark `goodput`: a training and targets **under kill -9**, compared with undisturbed ones.

A rank that is drawn by the seed is killed every so many seconds, the second time all ranks; the commands are
started again by the loops of docs/ranks.md, and go on until they are done. Goodput is the time of an
undisturbed run over that of a disturbed one. Both begin at the launch, so that one start is in each.

train             bash launch/supervise.sh torchrun …: all ranks start again, from the newest checkpoint
train-elastic     torchrun --max-restarts …: the same by torchrun itself
targets           a supervisor for each rank (--exchange none): that rank alone starts again
targets-together  bash launch/supervise.sh torchrun …: all ranks start again

`lost_steps_per_kill` counts optimizer steps between the newest checkpoint and the kill; `orphans` processes
that outlive their launch; `leftovers` claims and temporary files afterwards; `identical` is 1 where every
disturbed output has the bytes of an undisturbed one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import mlpmem_ds
from mlpmem_ds.benchmarks.common import Report, Row, check_places, median_of, row_of
from mlpmem_ds.benchmarks.gpu_check.made_up import write_base, write_corpus
from mlpmem_ds.benchmarks.gpu_check.sizes import BaseShape
from mlpmem_ds.benchmarks.kills import Kill, KilledRun, run_under_kills, schedule
from mlpmem_ds.benchmarks.made_up_keys import write_synthetic_keys
from mlpmem_ds.core.config import Flags, option, plain_values
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.objects.contents import CHECKPOINTS
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.checkpoint import list_checkpoints
from mlpmem_ds.stages.training.metrics import read_metrics

_logger = logging.getLogger("mlpmem_ds.benchmarks")
_ROOT = Path(mlpmem_ds.__file__).parents[1]
_ENDLESS = str(10**6)  # starts; the schedule is the limit
_NUMBER = re.compile("[0-9]+")
Job = Literal["train", "train-elastic", "targets", "targets-together"]


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Time of a training and of targets with ranks that are killed, against the time without.

    The default sizes take about a quarter of an hour on two quiet cores. The same command continues: each
    run leaves its figures in OUTPUT/runs.
    """

    example: ClassVar[str] = "python tools/bench.py goodput --output runs/goodput"

    output: Path = option("directory of the inputs, of all runs, and of goodput.json")
    jobs: tuple[Job, ...] = option("what is run, and by which loop", ("train", "targets"))
    kill_every_seconds: float = option("between two kills", 60.0, above=0)
    max_kills: int | None = option(
        "of a run; none = until it is done, which is never where a start takes longer", None, at_least=1
    )
    runs: int = option("disturbed and undisturbed runs of each job", 1, at_least=1)
    seed: int = option("of the ranks that are killed", 0)
    ranks: int = option("processes of each job", 2, at_least=1)
    positions: int = option("keys of the targets; their time grows with the square", 200_000, at_least=1)
    train_positions: int = option("keys of the training", 32_768, at_least=1)
    shard_positions: int = option("positions of a shard of the targets, a unit", 4096, at_least=1)
    epochs: float = option("passes of the training", 50.0, above=0)
    batch_positions: int = option("positions of a step", 2048, at_least=1)
    save_every_steps: int = option("steps between checkpoints", 20, at_least=1)
    dim: int = option("numbers in a key, and the width of the memory", 128, at_least=8)
    vocab_size: int = option("of the made-up text", 2048, at_least=2)
    k: int = option("neighbours of a position", 64, at_least=2)


def run(config: Config, world: World) -> None:
    """Do the runs that are missing, and write goodput.json."""
    check_places(config.output, name="goodput")
    if not (_ROOT / "launch" / "supervise.sh").is_file():
        raise UserError(
            f"launch/supervise.sh is not next to the package ({_ROOT}): run tools/bench.py of a checkout"
        )
    (config.output / "runs").mkdir(parents=True, exist_ok=True)
    report = Report("goodput", config)
    prepare(config, world)
    records = [
        measured(config, job, number, is_killed=is_killed)
        for number in range(config.runs)
        for job in config.jobs
        for is_killed in (False, True)
    ]
    rows = rows_of(records)
    report.publish(config.output / "goodput.json", rows, ratios_of(records, rows), runs={"each": records})


def prepare(config: Config, world: World) -> None:
    """Made-up keys for the targets; for the training a random base, a made-up text, its keys and targets."""
    inputs = config.output / "inputs"
    if any(job.startswith("targets") for job in config.jobs):
        write_synthetic_keys(inputs / "keys", config, world)
    if any(job.startswith("train") for job in config.jobs):
        _prepare_training(config, inputs / "train")


def _prepare_training(config: Config, root: Path) -> None:
    shape = BaseShape(
        width=config.dim,
        num_layers=2,
        num_heads=4,
        intermediate_size=2 * config.dim,
        vocab_size=config.vocab_size,
        context=256,
    )
    if not (root / "base" / "config.json").is_file():
        write_base(shape, root / "base")
    write_corpus(shape, config.train_positions, root / "corpus")
    words: tuple[object, ...] = (
        "--model",
        root / "base",
        "--corpus",
        root / "corpus",
        "--output",
        root / "keys",
    )
    _front_end("tools/extract_keys.py", *words)
    words = ("--keys", root / "keys", "--output", root / "targets", "--search", "exact")
    _front_end("tools/write_targets.py", *words, "--k", config.k, "--neighbour-perplexity", config.k / 2)


def _front_end(script: str, *words: object) -> None:
    subprocess.run([sys.executable, str(_ROOT / script), *map(str, words)], check=True)


def measured(config: Config, job: Job, number: int, *, is_killed: bool) -> dict[str, Any]:
    """The figures of one run; those of a run that was done are read."""
    name = f"{job}-{'killed' if is_killed else 'undisturbed'}-{number}"
    place, output = config.output / "runs" / f"{name}.json", config.output / "runs" / name
    settings = {key: value for key, value in plain_values(config).items() if key not in ("jobs", "runs")}
    if place.is_file() and (record := read_json(place))["settings"] == settings:
        return dict(record)
    shutil.rmtree(output, ignore_errors=True)  # a part of a run has no time of its own
    kills: Iterator[Kill] = iter(())
    if is_killed:
        kills = islice(schedule(config.kill_every_seconds, config.seed + number), config.max_kills)
    load = os.getloadavg()
    done = run_under_kills(
        commands_of(config, job, output),
        kills,
        log=config.output / "runs" / f"{name}.log",
        look=LostSteps(output) if job.startswith("train") else dict,
    )
    record = _record(job, done, output) | {"is_killed": is_killed, "settings": settings}
    record |= {"load_before": list(load), "load_after": list(os.getloadavg())}
    publish_json(place, record)
    _logger.info("%s: %.1f s, %d kills", name, done.seconds, len(done.kills))
    return record


def _record(job: Job, done: KilledRun, output: Path) -> dict[str, Any]:
    leftovers = [path for pattern in (".*.tmp", ".*.claim") for path in output.rglob(pattern)]
    return {
        "job": job,
        "seconds": round(done.seconds, 2),
        "kills": list(done.kills),
        "orphans": done.orphans,
        "leftovers": len(leftovers),
        "sha256": hashlib.sha256((output / "manifest.json").read_bytes()).hexdigest(),
    }


class LostSteps:
    """Called right after a kill: the newest step of the training that is not in a checkpoint."""

    def __init__(self, output: Path) -> None:
        self._output, self._lines = output, 0

    def __call__(self) -> dict[str, int]:
        steps = [int(line["step"]) for line in read_metrics(self._output) if "loss" in line]
        saved = [int(_NUMBER.findall(path.name)[-1]) for path in list_checkpoints(self._output / CHECKPOINTS)]
        done, newest = steps[-1] if steps else 0, saved[0] if saved else 0
        # A start that was killed before its first step leaves the lines of the one before.
        is_new = done != self._lines
        self._lines = done
        return {"step": done, "lost_steps": max(0, done - newest) if is_new else 0}


def commands_of(config: Config, job: Job, output: Path) -> list[tuple[list[str], dict[str, str]]]:
    """(words, variables) of what is started for a run."""
    supervisor = [
        "bash",
        str(_ROOT / "launch" / "supervise.sh"),
        "--max-rapid",
        _ENDLESS,
        "--rapid-seconds",
        "0",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(config.ranks)]
    variables = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if job == "train-elastic":
        words = [*torchrun, "--max-restarts", _ENDLESS, *_training(config, output)]
        return [(words, variables)]
    if job == "train":
        return [([*supervisor, *torchrun, *_training(config, output)], variables)]
    if job == "targets-together":
        return [([*supervisor, *torchrun, *_targets(config, output)], variables)]
    alone = [*supervisor, sys.executable, *_targets(config, output), "--exchange", "none"]
    return [
        (alone, {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.ranks)})
        for rank in range(config.ranks)
    ]


def _training(config: Config, output: Path) -> list[str]:
    inputs = config.output / "inputs" / "train"
    words: Sequence[object] = (
        *(_ROOT / "launch" / "train.py", "--ds_config", ds_configs() / "zero3.json"),
        *("--corpus", inputs / "corpus", "--keys", inputs / "keys", "--targets", inputs / "targets"),
        *("--num-blocks", 2, "--epochs", config.epochs, "--batch-positions", config.batch_positions),
        *("--validate-every", "none", "--save-every-steps", config.save_every_steps),
        *("--log-every-steps", 1, "--output", output),
    )
    return list(map(str, words))


def _targets(config: Config, output: Path) -> list[str]:
    words: Sequence[object] = (
        *(_ROOT / "tools" / "write_targets.py", "--keys", config.output / "inputs" / "keys"),
        *("--search", "exact", "--k", config.k, "--neighbour-perplexity", config.k / 2),
        *("--shard-positions", config.shard_positions, "--batch-positions", config.shard_positions),
        *("--output", output),
    )
    return list(map(str, words))


def rows_of(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Seconds of each job, undisturbed and killed."""
    rows = []
    for job in dict.fromkeys(record["job"] for record in records):
        for is_killed in (False, True):
            seconds = [
                record["seconds"]
                for record in records
                if (record["job"], record["is_killed"]) == (job, is_killed)
            ]
            rows.append(row_of(_arm(job, is_killed), "wall_seconds", "s", seconds))
    return rows


def _arm(job: str, is_killed: bool) -> str:
    return f"{job} {'killed' if is_killed else 'undisturbed'}"


def ratios_of(records: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> dict[str, float]:
    """Goodput of each job and seconds that a kill cost; lost steps, orphans, leftovers and bytes of all."""
    ratios: dict[str, float] = {}
    for job in dict.fromkeys(record["job"] for record in records):
        whole, killed = (median_of(rows, _arm(job, is_killed), "wall_seconds") for is_killed in (False, True))
        own = [record for record in records if record["job"] == job]
        num_kills = sum(len(record["kills"]) for record in own) / len([r for r in own if r["is_killed"]])
        name = job.replace("-", "_")
        ratios[f"{name}_goodput"] = whole / killed
        if num_kills:
            ratios[f"{name}_seconds_per_kill"] = (killed - whole) / num_kills
    lost = [kill["lost_steps"] for record in records for kill in record["kills"] if "lost_steps" in kill]
    if lost:
        ratios["lost_steps_per_kill"] = sum(lost) / len(lost)
        ratios["max_lost_steps"] = float(max(lost))
    ratios["orphans"] = float(sum(record["orphans"] for record in records))
    ratios["leftovers"] = float(sum(record["leftovers"] for record in records))
    hashes_by_job: dict[str, set[str]] = {}
    for record in records:
        hashes_by_job.setdefault(record["job"].partition("-")[0], set()).add(record["sha256"])
    ratios["identical"] = float(all(len(hashes) == 1 for hashes in hashes_by_job.values()))
    return ratios
