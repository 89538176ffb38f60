"""Benchmark `targets`: keys and index → **sparse kNN targets on disk**, ours beside the published recipe.

ours    stages.write_targets: lists of the nearest centroids, exact distances of the stored keys, self excluded by id,
        cut at a share of the mass, multi-frame zstd.
plain   what published scripts do, written anew: stock faiss search batch by batch, the first hit dropped, the index's
        approximate distances into a softmax, a dense batch x vocabulary array, a Python loop that keeps p > 1e-8 of each
        row, padding to the widest row, rows of int32 ids and float16 probabilities appended to one file.

Both read the same keys and the same index from disk, probe the same number of lists, use the same k neighbours, temperature
and threads, and leave their files on the same disk. Timed at the soft temperature (weight perplexity about 300), where rows
are widest. Ratios: `tv` and `tv_published_recipe` are at the soft temperature, `…_sharp` at the sharp one (about 30); total
variation is the mean over sampled positions, against exact search of all keys in this file's own words, rows normalised.

Without --keys they are made here: clusters of clusters of int8 codes whose spectrum falls like that of hidden states, and
Zipf values, some of them typical of the cluster. They stand in for real keys in speed; judge fidelity on real ones.

Shape legend: N positions, Q queries, D numbers in a key, K neighbours, V vocabulary, C clusters, W widest row of a batch.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import FORMAT, VERSION, Keys, open_keys, unit_name
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.maths.targets import fit_temperature
from mlpmem_ds.stages import build_index, write_targets

from .common import Report, Row, check_output, interleave, median_of, row_of, timing_rows, use_threads

DESCRIPTION = (
    "kNN targets from keys and an index: ours, and the published recipe (faiss search, dense scatter, loop over rows). "
    "The default sizes take about 5 minutes on two cores; --positions 400000 --plain-positions 50000 --runs 3 about half an hour."
)
_SEED = 1
_SCALE = 1 / 16
_BLOCK_SIZE = 1024
_UNIT_POSITIONS = 16 * _BLOCK_SIZE
_LEAST_PROBABILITY = 1e-8


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of tools/bench.py targets."""

    output: Path = option("JSON file to write; a working directory beside it is removed at the end")
    keys: Path | None = option("key directory to use in place of made-up keys; with --index", None)
    index: Path | None = option("index directory over --keys", None)
    positions: int = option("made-up keys", 50_000)
    dim: int = option("numbers in a made-up key", 256)
    vocab_size: int = option("vocabulary of the made-up values", 50257)
    factory: str = option("faiss factory of the index over made-up keys, or auto", "auto")
    k: int = option("neighbours of a position", 1024)
    nprobe: int = option("lists that a query probes", 32)
    mass: float = option("probability that ours keeps of each row", 0.999)
    soft_perplexity: float = option("neighbours that count at the soft temperature, which is timed", 300.0)
    sharp_perplexity: float = option("neighbours that count at the sharp temperature", 30.0)
    plain_positions: int = option("positions that plain does, 0 = all; its rate does not depend on it", 0)
    plain_batch: int = option("queries that plain searches at once", 2048)
    sample: int = option("positions compared with exact search", 500)
    runs: int = option("timed runs of each arm", 3)
    threads: int = option("CPU threads, 0 = as the environment says", 0)

    def __post_init__(self) -> None:
        for name in ("positions", "dim", "vocab_size", "k", "nprobe", "plain_batch", "sample", "runs"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        for name in ("plain_positions", "threads"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 0 or more")
        if (self.keys is None) != (self.index is None):
            raise UserError("--keys and --index go together: give both, or neither for made-up keys")
        for name in ("soft_perplexity", "sharp_perplexity"):
            if not 1 < getattr(self, name) < self.k:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name):g} must lie between 1 and --k {self.k}"
                )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both arms are given."""

    keys: Keys
    index: Path
    config: Config

    @property
    def num_plain(self) -> int:
        return min(self.config.plain_positions or self.keys.num_positions, self.keys.num_positions)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The true neighbours of sampled positions, by comparison with all keys."""

    positions_Q: np.ndarray
    squared_QK: np.ndarray  # float64, in squared key units
    values_QK: np.ndarray


def run(config: Config, world: World) -> None:
    check_output(config.output)
    use_threads(config.threads)
    if config.threads:
        faiss.omp_set_num_threads(config.threads)
    report = Report("targets", config)
    with tempfile.TemporaryDirectory(prefix=".bench-targets-", dir=config.output.parent) as work:
        rows, ratios = measure(prepare(config, Path(work), world), Path(work), world)
    report.publish(config.output, rows, ratios)


def prepare(config: Config, work: Path, world: World) -> Setting:
    """Open the keys and the index, or make them in `work`."""
    if config.keys is not None and config.index is not None:
        return Setting(keys=open_keys(config.keys), index=config.index, config=config)
    write_synthetic_keys(work / "keys", config, world)
    build_index.run(
        build_index.Config(keys=work / "keys", output=work / "index", factory=config.factory, num_shards=1), world
    )
    return Setting(keys=open_keys(work / "keys"), index=work / "index", config=config)


def measure(setting: Setting, work: Path, world: World) -> tuple[list[Row], dict[str, float]]:
    """Time both arms at the soft temperature; sizes and fidelity at both."""
    config = setting.config
    exact = exact_neighbours_of_sample(setting)
    temperatures = {
        name: fit_temperature(exact.squared_QK, np.isfinite(exact.squared_QK), perplexity)
        for name, perplexity in (("soft", config.soft_perplexity), ("sharp", config.sharp_perplexity))
    }
    arms = {
        "ours": lambda: ours(setting, temperatures["soft"], work / "soft", world),
        "plain": lambda: plain(setting, temperatures["soft"], work / "plain.bin"),
    }
    timings = interleave(arms, config.runs)
    rows = timing_rows(timings)
    counts = {"ours": setting.keys.num_positions, "plain": setting.num_plain}
    for arm, values in timings.items():
        for metric, field in (("positions_per_second", "wall"), ("positions_per_cpu_second", "cpu")):
            rates = [counts[arm] / getattr(timing, field) for timing in values]
            rows.append(row_of(arm, metric, "positions/s", rates))
    ours(setting, temperatures["sharp"], work / "sharp", world)
    for name, temperature in temperatures.items():
        rows += _fidelity_rows(setting, exact, name, temperature, work / name)
        rows.append(row_of("both", f"temperature_{name}", "squared key units", [temperature]))
    ratios = {
        "speed_over_plain": _ratio(rows, "positions_per_second"),
        "cpu_speed_over_plain": _ratio(rows, "positions_per_cpu_second"),
        "bytes_per_token_soft": median_of(rows, "ours", "bytes_per_token_soft"),
        "bytes_per_token_sharp": median_of(rows, "ours", "bytes_per_token_sharp"),
        "tv": median_of(rows, "ours", "tv_soft"),
        "tv_sharp": median_of(rows, "ours", "tv_sharp"),
        "tv_published_recipe": median_of(rows, "plain", "tv_soft"),
        "tv_published_recipe_sharp": median_of(rows, "plain", "tv_sharp"),
    }
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
            shard_positions=128 * setting.keys.manifest["block_size"],
        ),
        world,
    )


def plain(setting: Setting, temperature: float, output: Path) -> None:
    """Write the targets of the first positions, in order."""
    config, keys = setting.config, setting.keys
    index = stock_index(setting)
    codes_ND, values_N = keys.read("keys"), keys.read("values")
    with open(output, "wb") as stream:
        for start in range(0, setting.num_plain, config.plain_batch):
            queries_QD = codes_ND[start : min(start + config.plain_batch, setting.num_plain)]
            rows = plain_rows(index, queries_QD, values_N, setting, temperature)
            widest = max(len(ids) for ids, _ in rows)
            ids_QW = np.full((len(rows), widest), -1, np.int32)
            probabilities_QW = np.zeros((len(rows), widest), np.float16)
            for row, (ids, probabilities) in enumerate(rows):
                ids_QW[row, : len(ids)] = ids
                probabilities_QW[row, : len(ids)] = probabilities
            for ids_W, probabilities_W in zip(ids_QW, probabilities_QW, strict=True):
                kept_W = ids_W >= 0
                stream.write(np.uint32(kept_W.sum()).tobytes())
                stream.write(ids_W[kept_W].tobytes())
                stream.write(probabilities_W[kept_W].tobytes())


def plain_rows(
    index: faiss.Index, queries_QD: np.ndarray, values_N: np.ndarray, setting: Setting, temperature: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32, probabilities float16) of each query: k + 1 hits, the first taken for the query itself."""
    distances_QK, ids_QK = index.search(queries_QD.astype(np.float32), setting.config.k + 1)
    distances_QK, ids_QK = distances_QK[:, 1:], ids_QK[:, 1:]
    weights_QK = torch.softmax(-torch.from_numpy(distances_QK) * (setting.keys.scale**2 / temperature), dim=1)
    values_QK = torch.from_numpy(values_N[ids_QK].astype(np.int64))
    dense_QV = torch.zeros(len(queries_QD), setting.keys.manifest["vocab_size"])
    dense_QV.scatter_add_(1, values_QK, weights_QK)
    dense_QV /= dense_QV.sum(dim=1, keepdim=True)
    rows = []
    for dense_V in dense_QV.numpy():  # NumPy: torch would wake all its threads for each row
        ids = np.flatnonzero(dense_V > _LEAST_PROBABILITY)
        rows.append((ids.astype(np.int32), dense_V[ids].astype(np.float16)))
    return rows


def read_plain(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of plain's file."""
    content, start = path.read_bytes(), 0
    while start < len(content):
        count = int(np.frombuffer(content, np.uint32, 1, start)[0])
        yield (
            np.frombuffer(content, np.int32, count, start + 4),
            np.frombuffer(content, np.float16, count, start + 4 + 4 * count),
        )
        start += 4 + 6 * count


def stock_index(setting: Setting) -> faiss.Index:
    """The index as faiss itself reads it, shards merged, ready to search."""
    first, *others = [faiss.read_index(str(path)) for path in open_index(setting.index).shard_paths]
    for other in others:
        first.merge_from(other, 0)
    faiss.extract_index_ivf(first).nprobe = setting.config.nprobe
    return first


def exact_neighbours_of_sample(setting: Setting) -> Exact:
    """Compare sampled positions with every key but themselves; ties go to the lower position."""
    keys, config = setting.keys, setting.config
    positions_Q = build_index.sample_positions(keys.num_positions, config.sample, seed=_SEED)
    codes_ND, values_N = keys.read("keys"), keys.read("values")
    keys_ND = torch.from_numpy(codes_ND.astype(np.float32))
    squared, values = [], []
    for positions_q in np.array_split(positions_Q, max(1, len(positions_Q) // 64)):
        # float64: codes give exact integers whatever their number of dimensions
        queries_qD = keys_ND[torch.from_numpy(positions_q)].double()
        squared_qN = _squared_distances(queries_qD, keys_ND)
        squared_qN[np.arange(len(positions_q)), positions_q] = np.inf
        order_qK = np.argsort(squared_qN, axis=1, kind="stable")[:, : min(config.k, keys.num_positions - 1)]
        squared.append(np.take_along_axis(squared_qN, order_qK, axis=1) * keys.scale**2)
        values.append(values_N[order_qK].astype(np.int64))
    return Exact(positions_Q=positions_Q, squared_QK=np.concatenate(squared), values_QK=np.concatenate(values))


def dense_targets(exact: Exact, temperature: float, vocab_size: int) -> np.ndarray:
    """The exact distributions, float64 [Q, V]."""
    weights_QK = np.exp(-(exact.squared_QK - exact.squared_QK.min(axis=1, keepdims=True)) / temperature)
    dense_QV = np.zeros((len(weights_QK), vocab_size))
    np.add.at(dense_QV, (np.arange(len(weights_QK))[:, None], exact.values_QK), weights_QK)
    return dense_QV / dense_QV.sum(axis=1, keepdims=True)


def write_synthetic_keys(root: Path, config: Config, world: World) -> None:
    """A key directory as extract_keys leaves it, of made-up codes and values."""
    codes_ND, values_N = synthetic_keys(config.positions, config.dim, config.vocab_size)
    stage = open_stage(root, stage=FORMAT, version=VERSION, config=config, inputs={"corpus": "made up"}, world=world)
    firsts = range(0, config.positions, _UNIT_POSITIONS)

    def write(unit: str, writer: UnitWriter) -> None:
        rows = slice(int(unit), int(unit) + _UNIT_POSITIONS)
        writer.array(f"keys-{unit}.npy", codes_ND[rows])
        writer.array(f"values-{unit}.npy", values_N[rows])
        writer.array(f"log_probabilities-{unit}.npy", np.zeros(len(values_N[rows]), np.float32))

    units = [unit_name(first) for first in firsts]
    stage.run_units(units, write)
    stage.finish(
        units,
        lambda: {
            "codec": {"name": "int8", "dim": config.dim, "scale": _SCALE, "energy_kept": 1.0, "clipped_share": 0.0},
            "num_positions": config.positions,
            "unit_positions": _UNIT_POSITIONS,
            "key_size": config.dim,
            "input_size": 0,
            "vocab_size": config.vocab_size,
            "split": "train",
            "block_size": _BLOCK_SIZE,
        },
    )


def synthetic_keys(num_keys: int, dim: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [N, D] and values [N] (uint16 where they fit), by a fixed seed.

    Centres around centres; cluster sizes and values by Zipf's law; standard deviations of the directions fall as
    1/sqrt(rank), then a random rotation spreads them. Seven values of ten are one of their cluster's 64 tokens, so that
    1,024 neighbours carry about 290 distinct ones, as on WikiText with a small base.
    """
    generator = np.random.default_rng(_SEED)
    num_clusters = max(1, math.isqrt(num_keys) * 4)
    spread_D = 1 / np.sqrt(1 + np.arange(dim))
    rotation_DD = np.linalg.qr(generator.normal(size=(dim, dim)))[0]
    parents_CD = generator.normal(size=(max(1, num_clusters // 16), dim))
    centres_CD = parents_CD[generator.integers(len(parents_CD), size=num_clusters)] + generator.normal(
        size=(num_clusters, dim)
    )
    shares_C = 1 / (10 + np.arange(num_clusters))
    clusters_N = generator.choice(num_clusters, num_keys, p=shares_C / shares_C.sum())
    states_ND = (centres_CD[clusters_N] + generator.normal(size=(num_keys, dim))) * spread_D @ rotation_DD
    codes_ND = np.clip(np.rint(states_ND * (32 / states_ND.std())), -127, 127).astype(np.int8)

    shares_V = (1.0 + np.arange(vocab_size)) ** -1.15
    shares_V /= shares_V.sum()
    tokens_CT = generator.choice(vocab_size, (num_clusters, 64), p=shares_V)
    rank_N = np.minimum(generator.geometric(0.15, num_keys) - 1, 63)
    values_N = np.where(
        generator.random(num_keys) < 0.7,
        tokens_CT[clusters_N, rank_N],
        generator.choice(vocab_size, num_keys, p=shares_V),
    )
    return codes_ND, values_N.astype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _squared_distances(queries_QD: torch.Tensor, keys_ND: torch.Tensor) -> np.ndarray:
    """float64 [Q, N]."""
    parts = []
    for keys_nD in keys_ND.split(1 << 16):
        keys_nD = keys_nD.double()
        products_Qn = queries_QD @ keys_nD.t()
        parts.append(queries_QD.square().sum(1, keepdim=True) - 2 * products_Qn + keys_nD.square().sum(1))
    return torch.cat(parts, dim=1).numpy()


def _fidelity_rows(setting: Setting, exact: Exact, name: str, temperature: float, output: Path) -> list[Row]:
    """Total variation, bytes and entries of a row at one temperature; plain's from the sampled positions."""
    vocab_size = setting.keys.manifest["vocab_size"]
    expected_QV = dense_targets(exact, temperature, vocab_size)
    targets = open_targets(output).read_all()
    offsets = targets.offsets
    places = [slice(int(offsets[position]), int(offsets[position + 1])) for position in exact.positions_Q]
    rows_of_ours = [(targets.ids[place], targets.probabilities[place]) for place in places]
    queries_QD = setting.keys.gather("keys", exact.positions_Q)
    rows_of_plain = plain_rows(stock_index(setting), queries_QD, setting.keys.read("values"), setting, temperature)
    plain_widths = [len(ids) for ids, _ in rows_of_plain]
    num_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return [
        row_of("ours", f"tv_{name}", "total variation", [total_variation(rows_of_ours, expected_QV)]),
        row_of("plain", f"tv_{name}", "total variation", [total_variation(rows_of_plain, expected_QV)]),
        row_of("ours", f"bytes_per_token_{name}", "B", [num_bytes / setting.keys.num_positions]),
        row_of("plain", f"bytes_per_token_{name}", "B", [4 + 6 * float(np.mean(plain_widths))]),
        row_of("ours", f"entries_per_token_{name}", "entries", [len(targets.ids) / setting.keys.num_positions]),
        row_of("plain", f"entries_per_token_{name}", "entries", [float(np.mean(plain_widths))]),
    ]


def total_variation(rows: list[tuple[np.ndarray, np.ndarray]], expected_QV: np.ndarray) -> float:
    """Mean over the rows of half the absolute difference to the expected distribution; rows are normalised first."""
    distances = []
    for (ids, probabilities), expected_V in zip(rows, expected_QV, strict=True):
        found_V = np.zeros(len(expected_V))
        found_V[ids] = probabilities.astype(np.float64)
        distances.append(np.abs(found_V / max(found_V.sum(), 1e-300) - expected_V).sum() / 2)
    return float(np.mean(distances))


def _ratio(rows: list[Row], metric: str) -> float:
    return median_of(rows, "ours", metric) / median_of(rows, "plain", metric)
