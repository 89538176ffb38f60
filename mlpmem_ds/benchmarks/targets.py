"""Benchmark `targets`: keys and index → **sparse kNN targets on disk**, compared with the published recipe.

ours      stages.write_targets: lists of the nearest centroids, exact distances of the stored keys, self
          excluded by id, cut at a share of the mass, compact encoding in multi-frame zstd.
plain     the published way (published_targets.py): faiss search, PQ distances, first hit dropped, dense
          scatter, loop over rows.

Speed, on made-up keys always: both read the same keys and index from disk, probe as many lists, use the same
neighbours, temperature and threads, and write to the same disk. At the soft temperature (weight perplexity
about 300), where rows are widest. `reader`: CPU time of reading ours back, blocks in random order.

Fidelity and size, on --keys where given: whole blocks of positions drawn by hash, searched through the index
that build_index chooses, and the published index (IVF4096,PQ64, fewer lists where keys are few) over
--raw-keys; the truth is exact search over the raw keys (or --keys), rows normalized. At three temperatures:
soft and sharp (geometric mean of the rows' weight perplexity about 300 and 30), and sharp_mean (arithmetic
mean about 30: rows differ much, so this one is sharper).

Shape legend: N positions, Q sampled ones, D numbers in a key, K neighbours.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import faiss

from mlpmem_ds.benchmarks.common import (
    Report,
    Row,
    check_output,
    interleave,
    median_of,
    row_of,
    timing_rows,
    use_threads,
)
from mlpmem_ds.benchmarks.made_up_keys import synthetic_keys, write_synthetic_keys
from mlpmem_ds.benchmarks.published_targets import stock_index, write_published
from mlpmem_ds.benchmarks.target_fidelity import Case, fidelity_rows, sample_blocks, temperatures_of
from mlpmem_ds.core.config import Flags, flag_name, option
from mlpmem_ds.core.hashing import shuffled
from mlpmem_ds.core.log import read_events
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.targets import write_targets
from mlpmem_ds.stages.targets.audit import open_truth
from mlpmem_ds.stages.targets.config import check_perplexity

__all__ = [
    "Config",
    "Setting",
    "measure_speed",
    "ours",
    "plain",
    "prepare",
    "run",
    "synthetic_keys",
    "write_synthetic_keys",
]


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """kNN targets from keys and an index: ours, and the published recipe (faiss search, dense scatter, loop
    over rows).

    The default sizes take about 2 minutes on two cores, with --keys of 700,000 positions about 4.
    """

    example: ClassVar[str] = "python tools/bench.py targets --output targets.json"

    output: Path = option("JSON file to write; a working directory next to it is removed at the end")
    keys: Path | None = option("key directory for fidelity and size, in place of the made-up keys", None)
    raw_keys: Path | None = option(
        "with --keys: the same positions in --codec raw, as truth and for the published index", None
    )
    index: Path | None = option("index directory over --keys; left out, one is built", None)
    positions: int = option("made-up keys", 50_000, at_least=1)
    dim: int = option("numbers in a made-up key", 256, at_least=1)
    vocab_size: int = option("vocabulary of the made-up values", 50257, at_least=1)
    factory: str = option("faiss factory of our index, or auto", "auto")
    published_factory: str = option(
        "faiss factory of the published index, or auto = IVF4096,PQ64 scaled to the keys", "auto"
    )
    k: int = option("neighbours of a position", 1024, at_least=1)
    nprobe: int = option("lists that a query probes", 32, at_least=1)
    mass: float = option("probability that ours keeps of each row", 0.999, above=0, at_most=1)
    soft_perplexity: float = option(
        "neighbours that count at the soft temperature, which is timed", 300.0, above=1
    )
    sharp_perplexity: float = option("neighbours that count at the sharp temperature", 30.0, above=1)
    plain_positions: int | None = option(
        "positions that plain does, none = all; its rate does not depend on it", 20_000, at_least=1
    )
    plain_batch: int = option("queries that plain searches at once", 2048, at_least=1)
    sample: int = option("positions compared with exact search, in whole blocks", 4096, at_least=1)
    runs: int = option("timed runs of each arm", 3, at_least=1)
    threads: int | None = shared_flags.threads()

    def check(self) -> None:
        if self.keys is None:
            self.refuse_unused("index", "raw_keys", of="--keys")
        for name in ("soft_perplexity", "sharp_perplexity"):
            check_perplexity(getattr(self, name), self.k, flag=flag_name(name))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Keys and the index over them, which both arms are given."""

    keys: Keys
    index: Path
    config: Config

    @property
    def num_plain(self) -> int:
        return min(self.config.plain_positions or self.keys.num_positions, self.keys.num_positions)


def run(config: Config, world: World) -> None:
    check_output(config.output)
    keys = open_keys(config.keys) if config.keys else None
    truth = open_truth(config.raw_keys, keys) if keys else None
    use_threads(config.threads)
    if config.threads:
        faiss.omp_set_num_threads(config.threads)
    report = Report("targets", config)
    with tempfile.TemporaryDirectory(prefix=".bench-targets-", dir=config.output.parent) as directory:
        work = Path(directory)
        setting = prepare(config, work, world)
        case = case_of(setting, keys, truth, work, world)
        rows, ratios = measure_fidelity(case, config, work)
        temperatures = temperatures_of(case_of_made_up(setting, world), config)
        soft, sharp = (temperatures[name] for name in ("soft", "sharp"))
        speed_rows, speed_ratios = measure_speed(setting, soft, sharp, work, world)
    if keys is not None:
        speed_ratios |= _share_of_extraction(keys, median_of(speed_rows, "ours", "positions_per_second"))
    report.publish(config.output, rows + speed_rows, ratios | speed_ratios)


def prepare(config: Config, work: Path, world: World) -> Setting:
    """Made-up keys and an index over them, in `work`."""
    write_synthetic_keys(work / "keys", config, world)
    _build(work / "keys", work / "index", config.factory, world)
    return Setting(keys=open_keys(work / "keys"), index=work / "index", config=config)


def case_of_made_up(setting: Setting, world: World) -> Case:
    """Fidelity of the made-up keys: both arms share the index."""
    return Case(
        keys=setting.keys,
        truth=setting.keys,
        index=setting.index,
        published=setting.index,
        device=device_of_rank("auto", world),
    )


def case_of(setting: Setting, keys: Keys | None, truth: Keys | None, work: Path, world: World) -> Case:
    """What fidelity is measured on: --keys with our index and the published one, or the made-up keys."""
    config = setting.config
    if keys is None or truth is None:
        return case_of_made_up(setting, world)
    index = config.index
    if index is None:
        index = work / "index-of-keys"
        _build(keys.root, index, config.factory, world)
    published = work / "published"
    factory = config.published_factory
    _build(truth.root, published, published_factory(truth) if factory == "auto" else factory, world)
    return Case(
        keys=keys,
        truth=truth,
        index=index,
        published=published,
        device=device_of_rank("auto", world),
    )


def published_factory(keys: Keys) -> str:
    """IVF4096,PQ64, with the power of two of lists that leaves at least 192 keys a list where keys are
    fewer."""
    lists = min(4096, 2 ** max(0, (keys.num_positions // 192).bit_length() - 1))
    parts = next(parts for parts in range(min(64, keys.dim), 0, -1) if keys.dim % parts == 0)
    return f"IVF{lists},PQ{parts}"


def measure_fidelity(case: Case, config: Config, work: Path) -> tuple[list[Row], dict[str, float]]:
    """Total variation, recall and bytes of both arms on sampled blocks, at three temperatures."""
    sample = sample_blocks(case.keys, config.sample)
    rows = fidelity_rows(case, config, sample, work)
    ratios = {
        "tv": median_of(rows, "ours", "tv_soft"),
        "tv_sharp": median_of(rows, "ours", "tv_sharp"),
        "tv_published_recipe": median_of(rows, "plain", "tv_soft"),
        "tv_published_recipe_sharp": median_of(rows, "plain", "tv_sharp"),
        "recall": median_of(rows, "ours", "recall_k"),
        "recall_published_recipe": median_of(rows, "plain", "recall_k"),
    }
    for temperature in ("soft", "sharp", "sharp_mean"):
        ratios[f"bytes_per_token_{temperature}"] = median_of(rows, "ours", f"bytes_per_token_{temperature}")
    return rows, ratios


def measure_speed(
    setting: Setting, soft: float, sharp: float, work: Path, world: World
) -> tuple[list[Row], dict[str, float]]:
    """Time both arms at the soft temperature, and the reader at both."""
    config = setting.config
    arms = {
        "ours": partial(ours, setting, soft, work / "soft", world),
        "plain": partial(plain, setting, soft, work / "plain.bin"),
    }
    timings = interleave(arms, config.runs)
    rows = timing_rows(timings)
    counts = {"ours": setting.keys.num_positions, "plain": setting.num_plain}
    for arm, values in timings.items():
        for metric, field in (("positions_per_second", "wall"), ("positions_per_cpu_second", "cpu")):
            rates = [counts[arm] / getattr(timing, field) for timing in values]
            rows.append(row_of(arm, metric, "positions/s", rates))
    ours(setting, sharp, work / "sharp", world)
    ratios = {
        "speed_over_plain": _ratio(rows, "positions_per_second"),
        "cpu_speed_over_plain": _ratio(rows, "positions_per_cpu_second"),
    }
    for name in ("soft", "sharp"):
        rates = [read_rate(work / name) for _ in range(config.runs)]
        rows.append(row_of("reader", f"targets_per_cpu_second_{name}", "positions/s", rates))
        ratios[f"reader_targets_per_cpu_second_{name}"] = median_of(
            rows, "reader", f"targets_per_cpu_second_{name}"
        )
    return rows, ratios


def ours(setting: Setting, temperature: float, output: Path, world: World) -> None:
    """Write the targets of all positions anew."""
    shutil.rmtree(output, ignore_errors=True)
    config = setting.config
    write_targets.run(
        write_targets.Config(
            keys=setting.keys.root,
            index=setting.index,
            output=output,
            k=config.k,
            temperature=repr(temperature),
            mass=config.mass,
            search="ivf",
            nprobe=config.nprobe,
            threads=config.threads,
            shard_positions=128 * setting.keys.manifest.block_size,
        ),
        world,
    )


def plain(setting: Setting, temperature: float, output: Path) -> None:
    """Write the targets of the first positions, in order."""
    config = setting.config
    index = stock_index(setting.index, config.nprobe)
    write_published(
        setting.keys,
        index,
        config.k,
        temperature,
        output,
        num_positions=setting.num_plain,
        batch=config.plain_batch,
    )


def read_rate(root: Path) -> float:
    """Positions a CPU second, every block once in random order."""
    targets = open_targets(root)
    size, total = targets.manifest.block_size, targets.num_positions
    blocks = shuffled(-(-total // size), 0)
    targets.read(0, 1)  # the index of samples and the vocabulary's order are read once
    start = time.process_time()
    for block in blocks.tolist():
        targets.read(block * size, min((block + 1) * size, total))
    return total / (time.process_time() - start)


def _build(keys: Path, output: Path, factory: str, world: World) -> None:
    build_index.run(build_index.Config(keys=keys, output=output, factory=factory, num_shards=1), world)


def _ratio(rows: list[Row], metric: str) -> float:
    return median_of(rows, "ours", metric) / median_of(rows, "plain", metric)


def _share_of_extraction(keys: Keys, positions_per_second: float) -> dict[str, float]:
    """Seconds of search, aggregation and writing over those of one rank's extraction of the same number of
    positions."""
    events = read_events(keys.root / "log.jsonl")
    seconds = sum(event.get("seconds", 0) for event in events if event["event"] == "unit")
    return {"targets_over_extraction": keys.num_positions / positions_per_second / seconds} if seconds else {}
