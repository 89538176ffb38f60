"""Fourth stage: keys (and index) → targets. Each key's neighbours among all keys, as a next-token distribution.

Phase 1 measures a sample: the temperature that gives the wanted neighbour-weight perplexity, or the perplexity that the
given temperature has. Phase 2 is one unit for each shard file. The queries are the stored keys themselves and a position
never finds itself; distances are those of the stored keys also where an index chose the candidates. With int8 keys they are
exact integers, and a row depends on nothing but the keys and the flags.

N positions, n positions at hand, D numbers in a key, K neighbours, P lists that a query probes, L lists.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block, deal, split_blocks
from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.hashing import sample_positions
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus, token_dtype
from mlpmem_ds.formats.index_directory import IndexDirectory, open_index
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.targets import FORMAT, VERSION, TargetBlock, index_name, pack_block, shard_name, write_shard
from mlpmem_ds.maths.knn import Exclusion, Neighbours, exact_neighbours, list_neighbours
from mlpmem_ds.maths.targets import (
    SparseRows,
    aggregate,
    fit_temperature,
    neighbour_weights,
    truncate,
    weight_perplexity,
)

_logger = logging.getLogger(__name__)
_TEMPERATURE = "temperature"
_SAMPLE = 1000
_SEED = 2
_MOST_KEYS_FOR_EXACT = 200_000  # 5 minutes on two cores; above it the lists are worth their recall
_MOST_COUNTS = 2**16 - 1  # entries of a row are counted in uint16


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of tools/write_targets.py."""

    keys: Path = option("key directory of extract_keys")
    output: Path = option("target directory to write")
    index: Path | None = option(
        "index directory of build_index over the same keys; not needed for exact search", None, identity=False
    )
    k: int = option("neighbours of a position", 1024)
    temperature: str = option("of the weights exp(-d²/T), in squared key units, or auto", "auto")
    neighbour_perplexity: float = option(
        "with auto: how many neighbours shall count, exp of the weights' entropy", 100.0
    )
    mass: float = option("probability to keep of each row, above 0 and at most 1", 0.999)
    search: Literal["auto", "exact", "ivf"] = option(
        f"compare with all keys, or with those of the nearest lists; auto = exact up to {_MOST_KEYS_FOR_EXACT:,} keys",
        "auto",
    )
    nprobe: int = option("with ivf: lists that a query probes", 16)
    exclude: Literal["none", "same-document"] = option(
        "which neighbours a position may not have besides itself", "none"
    )
    exclude_window: int = option("positions on either side that are no neighbours", 0)
    corpus: Path | None = option("corpus directory of the keys, for --exclude same-document", None, identity=False)
    shard_positions: int = option("positions in a shard file, a multiple of the corpus' block size", 131072)
    batch_positions: int = option("queries searched at once", 16384, identity=False)
    threads: int = option("CPU threads of each rank, 0 = as the environment says", 0, identity=False)

    def __post_init__(self) -> None:
        if not 1 <= self.k <= _MOST_COUNTS:
            raise UserError(f"--k {self.k} must be 1 to {_MOST_COUNTS}")
        if self.temperature != "auto" and not _positive(self.temperature):
            raise UserError(f"--temperature {self.temperature} must be auto or a number above 0")
        if self.temperature == "auto" and not 1 < self.neighbour_perplexity < self.k:
            raise UserError(f"--neighbour-perplexity {self.neighbour_perplexity:g} must lie between 1 and --k {self.k}")
        if not 0 < self.mass <= 1:
            raise UserError(f"--mass {self.mass:g} must be above 0 and at most 1")
        for name in ("nprobe", "shard_positions", "batch_positions"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        for name in ("exclude_window", "threads"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 0 or more")
        if self.exclude == "same-document" and self.corpus is None:
            raise UserError("--exclude same-document needs to know the documents: give --corpus")


def run(config: Config, world: World) -> None:
    keys = open_keys(config.keys)
    search = _resolve_search(config, keys)
    index = _open_index(config, keys) if search == "ivf" else None
    documents_N, inputs = _documents(config, keys)
    inputs |= {"keys": keys.sha256} | ({"index": index.sha256} if index else {})
    _check_sizes(config, keys)
    resolved = {
        "search": search,
        "nprobe": config.nprobe if index else None,
        "temperature": "auto" if config.temperature == "auto" else float(config.temperature),
    }
    stage = open_stage(
        config.output, stage=FORMAT, version=VERSION, config=config, inputs=inputs, world=world, extra=resolved
    )
    if config.threads:
        torch.set_num_threads(config.threads)
    datastore = _Datastore(keys, index, config, documents_N)
    stage.run_units([_TEMPERATURE], lambda unit, writer: _measure(datastore, config))
    stage.wait_for([_TEMPERATURE])
    measured = stage.summaries([_TEMPERATURE])[0]
    _logger.info(
        "%s search, temperature %.4g, neighbour-weight perplexity %.1f",
        search,
        measured["temperature"],
        measured["neighbour_perplexity"],
    )
    shards = {f"knn-{block.start:012d}": block for block in split_blocks(keys.num_positions, config.shard_positions)}
    mine = deal(list(shards.values()), world.rank, world.size)
    progress = Progress(sum(block.size for block in mine), label="targets", unit="positions", world=world)

    def write(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        return _write(datastore, config, shards[unit], measured["temperature"], writer, progress)

    stage.run_units(list(shards), write)
    progress.close()

    def describe() -> dict[str, Any]:
        summaries = stage.summaries(list(shards))
        totals = {
            name: sum(summary[name] for summary in summaries)
            for name in ("entries", "rows_short_of_k", "rows_without_neighbours")
        }
        return {
            "num_positions": keys.num_positions,
            "block_size": keys.manifest["block_size"],
            "shard_positions": config.shard_positions,
            "vocab_size": keys.manifest["vocab_size"],
            "k": config.k,
            "temperature": measured["temperature"],
            "neighbour_perplexity": measured["neighbour_perplexity"],
            "temperature_rule": "auto" if config.temperature == "auto" else "fixed",
            "mass": config.mass,
            "search": search,
            "exclude": {"rule": config.exclude, "window": config.exclude_window},
            **totals,
            "shards": [
                {
                    "name": shard_name(*_first_and_count(block)),
                    "first": block.start,
                    "count": block.size,
                    "entries": summary["entries"],
                    "samples": summary["samples"],
                }
                for block, summary in zip(shards.values(), summaries, strict=True)
            ],
        }

    stage.finish([_TEMPERATURE, *shards], describe)


class _Datastore:
    """All keys in memory, loaded when the first unit asks, with what a position may not find."""

    def __init__(
        self, keys: Keys, index: IndexDirectory | None, config: Config, documents_N: np.ndarray | None
    ) -> None:
        self.keys, self._index, self._config, self._documents_N = keys, index, config, documents_N

    @cached_property
    def vectors_ND(self) -> np.ndarray:
        """int8 codes, or float16 keys."""
        return self.keys.read("keys")

    @cached_property
    def values_N(self) -> np.ndarray:
        return self.keys.read("values")

    @cached_property
    def _lists(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """(trained index, offsets of the lists, ids of the lists)."""
        from mlpmem_ds.engines import faiss as engine

        assert self._index is not None
        if self._config.threads:
            engine.set_num_threads(self._config.threads)
        trained = engine.read_index(self._index.trained_path, for_search=False)
        shards = [engine.read_index(path, for_search=False) for path in self._index.shard_paths]
        return (trained, *engine.inverted_lists(shards))

    def neighbours(self, positions_n: np.ndarray) -> Neighbours:
        """The k nearest keys of each of these positions (int64)."""
        if self._index is None:
            return exact_neighbours(
                self.vectors_ND[positions_n], self.vectors_ND, self._config.k, exclusion=self._exclusion(positions_n)
            )
        from mlpmem_ds.engines import faiss as engine

        trained, offsets_L1, ids_N = self._lists
        probes_nP = engine.assign(trained, self.vectors_ND[positions_n], self._config.nprobe)
        # Queries of one list side by side: they probe the same lists, which are then read once for many of them.
        order_n = np.argsort(probes_nP[:, 0], kind="stable")
        positions_n, place_n = positions_n[order_n], np.argsort(order_n)
        found = list_neighbours(
            self.vectors_ND[positions_n],
            probes_nP[order_n],
            offsets_L1,
            ids_N,
            self.vectors_ND,
            self._config.k,
            exclusion=self._exclusion(positions_n),
        )
        return Neighbours(ids_QK=found.ids_QK[place_n], distances_QK=found.distances_QK[place_n])

    def _exclusion(self, positions_n: np.ndarray) -> Exclusion:
        documents_N = self._documents_N
        return Exclusion(
            query_ids_Q=positions_n,
            window=self._config.exclude_window,
            key_groups_N=documents_N,
            query_groups_Q=None if documents_N is None else documents_N[positions_n],
        )

    def squared_distances(self, neighbours: Neighbours) -> tuple[np.ndarray, np.ndarray]:
        """(distances² in key units, float64 [n, K]; which are neighbours, bool [n, K])."""
        valid_nK = neighbours.ids_QK >= 0
        return np.where(valid_nK, neighbours.distances_QK, 0).astype(np.float64) * self.keys.scale**2, valid_nK


def _measure(datastore: _Datastore, config: Config) -> dict[str, Any]:
    """Unit `temperature`: fit or take the temperature, and measure the neighbour-weight perplexity on sampled positions."""
    positions = sample_positions(datastore.keys.num_positions, _SAMPLE, seed=_SEED)
    squared_nK, valid_nK = datastore.squared_distances(datastore.neighbours(positions))
    if config.temperature == "auto":
        try:
            # Six digits: legible, and the same where another processor's exp differs in the last bit.
            temperature = float(f"{fit_temperature(squared_nK, valid_nK, config.neighbour_perplexity):.6g}")
        except ValueError as error:
            raise UserError(f"--neighbour-perplexity: {error}; or set --temperature (and another --output)") from error
    else:
        temperature = float(config.temperature)
    found_n = valid_nK.any(axis=1)
    perplexities_n = weight_perplexity(neighbour_weights(squared_nK, temperature, valid_nK)[found_n])
    return {
        "temperature": temperature,
        "sampled_positions": len(positions),
        "neighbour_perplexity": float(np.exp(np.log(perplexities_n).mean())) if found_n.any() else 1.0,
    }


def _write(
    datastore: _Datastore, config: Config, shard: Block, temperature: float, writer: UnitWriter, progress: Progress
) -> dict[str, Any]:
    """One unit: search the shard's positions batch by batch and write their rows sample by sample."""
    short = without = 0
    block_size = datastore.keys.manifest["block_size"]
    dtype = token_dtype(datastore.keys.manifest["vocab_size"])

    def blocks() -> Iterator[TargetBlock]:
        nonlocal short, without
        for batch in split_blocks(shard.size, block_size * max(1, config.batch_positions // block_size)):
            first = shard.start + batch.start
            neighbours = datastore.neighbours(np.arange(first, first + batch.size))
            counts_n = (neighbours.ids_QK >= 0).sum(axis=1)
            short, without = short + int((counts_n < config.k).sum()), without + int((counts_n == 0).sum())
            for block in split_blocks(batch.size, block_size):
                rows, dropped_n = _rows(datastore, neighbours, block, first, temperature, config.mass)
                yield pack_block(first + block.start, rows, dropped_n, dtype=dtype)
            progress.advance(batch.size)

    name = shard_name(*_first_and_count(shard))
    with writer.file(name) as shard_path, writer.file(index_name(name)) as index_path:
        totals = write_shard(shard_path, index_path, blocks())
    return {**totals, "rows_short_of_k": short, "rows_without_neighbours": without}


def _rows(
    datastore: _Datastore, neighbours: Neighbours, block: Block, first: int, temperature: float, mass: float
) -> tuple[SparseRows, np.ndarray]:
    """The distributions of rows [start, stop) of a batch that starts at position `first`, and the mass dropped from each."""
    part = Neighbours(ids_QK=neighbours.ids_QK[slice(*block)], distances_QK=neighbours.distances_QK[slice(*block)])
    squared_nK, valid_nK = datastore.squared_distances(part)
    weights_nK = neighbour_weights(squared_nK, temperature, valid_nK)
    rows = aggregate(weights_nK, datastore.values_N[np.maximum(part.ids_QK, 0)])
    return truncate(rows, mass, datastore.values_N[first + block.start : first + block.stop].astype(np.int64))


def _resolve_search(config: Config, keys: Keys) -> str:
    automatic = "exact" if keys.num_positions <= _MOST_KEYS_FOR_EXACT else "ivf"
    search = automatic if config.search == "auto" else config.search
    if search == "ivf" and config.index is None:
        raise UserError(
            f"--search {config.search} of {keys.num_positions:,} keys needs --index: build one with build_index, "
            "or choose --search exact"
        )
    if search == "exact" and config.index is not None:
        _logger.info("exact search of %s keys leaves --index unused", f"{keys.num_positions:,}")
    return search


def _open_index(config: Config, keys: Keys) -> IndexDirectory:
    assert config.index is not None
    index = open_index(config.index)
    if index.keys_sha256 != keys.sha256:
        raise UserError(
            f"--index {config.index} was built over other keys than --keys {config.keys}: build it over these"
        )
    return index


def _documents(config: Config, keys: Keys) -> tuple[np.ndarray | None, dict[str, str]]:
    """(document number of each position, int32 [N], or None where it does not matter; the input that this brings)."""
    if config.exclude == "none":
        if config.corpus is not None:
            _logger.warning("--corpus is not used without --exclude same-document")
        return None, {}
    assert config.corpus is not None
    corpus = open_corpus(config.corpus, keys.manifest["split"])
    if corpus.sha256 != keys.corpus_sha256:
        raise UserError(
            f"--corpus {config.corpus} is not the one that --keys {config.keys} were extracted from: give that one"
        )
    return corpus.documents_of(np.arange(keys.num_positions)).astype(np.int32), {"corpus": corpus.sha256}


def _check_sizes(config: Config, keys: Keys) -> None:
    block_size = keys.manifest["block_size"]
    if config.shard_positions % block_size:
        nearest = max(block_size, round(config.shard_positions / block_size) * block_size)
        raise UserError(
            f"--shard-positions {config.shard_positions} is not a multiple of the corpus' block size "
            f"{block_size}: choose {nearest}"
        )
    others = keys.num_positions - 1
    if config.temperature == "auto" and others <= config.neighbour_perplexity:
        raise UserError(
            f"--neighbour-perplexity {config.neighbour_perplexity:g} cannot be reached with {others} other keys: "
            "choose a smaller one, or set --temperature"
        )


def _first_and_count(block: Block) -> tuple[int, int]:
    return block.start, block.size


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
