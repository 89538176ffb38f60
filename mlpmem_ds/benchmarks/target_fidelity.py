"""How far targets are from exact ones, and how large: ours and the published recipe on the same sampled
positions.

Shape legend: Q sampled positions, D numbers in a key, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlpmem_ds.benchmarks.common import Row, row_of
from mlpmem_ds.benchmarks.published_targets import published_hits, published_rows, stock_index
from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.hashing import shuffled
from mlpmem_ds.formats.corpus import token_dtype
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.formats.target_encoding import frequency_order, pack_block, unpack_block
from mlpmem_ds.formats.target_shards import index_name, shard_name, write_shard
from mlpmem_ds.maths.knn import Exclusion, Neighbours, exact_neighbours
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.target_distance import compare_rows, recall
from mlpmem_ds.maths.targets import aggregate
from mlpmem_ds.maths.weighting import Weighting, fit_weighting, weight_perplexity
from mlpmem_ds.stages.retrieval.neighbour_search import open_search, squared_key_distances
from mlpmem_ds.stages.targets.teacher import Teacher

_SEED = 1
_HALVINGS = 40


@dataclass(frozen=True, kw_only=True)
class Case:
    """Keys that ours searches through `index`, and the truth, over whose vectors the `published` index is;
    `device` is where ours and the exact search compare keys."""

    keys: Keys
    truth: Keys
    index: Path
    published: Path
    device: torch.device


def sample_blocks(keys: Keys, num_positions: int) -> np.ndarray:
    """Positions of as many whole blocks, drawn by hash, as hold `num_positions`: int64 [Q], ascending."""
    size, total = keys.manifest.block_size, keys.num_positions
    blocks = np.sort(shuffled(-(-total // size), _SEED)[: -(-num_positions // size)])
    return np.concatenate(
        [np.arange(block * size, min((block + 1) * size, total)) for block in blocks.tolist()]
    )


def exact_of(case: Case, positions_Q: np.ndarray, k: int) -> tuple[Neighbours, np.ndarray, np.ndarray]:
    """(true neighbours, their squared distances in key units, which are there)."""
    vectors_ND = case.truth.read("keys")
    exact = exact_neighbours(
        vectors_ND[positions_Q],
        vectors_ND,
        k,
        exclusion=Exclusion(query_ids_Q=positions_Q),
        device=case.device,
    )
    return (exact, *squared_key_distances(exact, case.truth.scale))


def temperatures_of(case: Case, config: Any) -> dict[str, float]:
    """soft, sharp: where the geometric mean of the rows' weight perplexity is as asked; sharp_mean: the
    arithmetic one."""
    _, squared_QK, valid_QK = exact_of(case, sample_blocks(case.keys, min(config.sample, 1024)), config.k)
    return _fit(squared_QK, valid_QK, config)


def fidelity_rows(case: Case, config: Any, positions_Q: np.ndarray, work: Path) -> list[Row]:
    """Rows `recall_…`, `tv_…`, `divergence_…`, `bytes_per_token_…`, `entries_per_token_…` of arms ours
    (compact), exact (ours in the exact encoding) and plain."""
    exact, squared_QK, valid_QK = exact_of(case, positions_Q, config.k)
    search = open_search(
        case.keys,
        open_index(case.index),
        how="lists",
        nprobe=config.nprobe,
        threads=config.threads,
        device=case.device,
    )
    teacher = Teacher(keys=case.keys, search=search, k=config.k)
    values_N = case.keys.read("values")
    found = teacher.find(positions_Q).unpack()
    stock = stock_index(case.published, config.nprobe)
    queries_QD = case.truth.gather("keys", positions_Q)
    hits_QK = published_hits(stock, queries_QD, config.k)[1]
    rows = []
    for arm, ids_QK in (("ours", found.ids_QK), ("plain", hits_QK)):
        for name, count in (("1", 1), ("64", 64), ("k", config.k)):
            rows.append(
                row_of(arm, f"recall_{name}", "share", [float(recall(ids_QK, exact.ids_QK, count).mean())])
            )
    for name, temperature in _fit(squared_QK, valid_QK, config).items():
        weights_QK = Weighting(temperature=temperature).weights(squared_QK, valid_QK)
        truth = aggregate(weights_QK, values_N[np.maximum(exact.ids_QK, 0)])
        perplexities_Q = weight_perplexity(weights_QK)
        rows += [
            row_of("both", f"temperature_{name}", "squared key units", [temperature]),
            row_of(
                "both", f"perplexity_{name}", "geometric mean", [float(np.exp(np.log(perplexities_Q).mean()))]
            ),
            row_of("both", f"perplexity_mean_{name}", "arithmetic mean", [float(perplexities_Q.mean())]),
        ]
        for arm, encoding in (("ours", "compact"), ("exact", "exact")):
            written, num_bytes = _written(
                teacher, found, positions_Q, temperature, config.mass, encoding, work
            )
            rows += _rows_of(arm, name, truth, written, num_bytes, case.keys)
        published = published_rows(case.truth, stock, queries_QD, values_N, config.k, temperature)
        counts_Q = np.array([len(ids) for ids, _ in published])
        sparse = SparseRows.from_counts(
            counts_Q,
            np.concatenate([ids for ids, _ in published]).astype(np.int64),
            np.concatenate([probabilities for _, probabilities in published]).astype(np.float64),
        )
        num_bytes = 4 * len(counts_Q) + 6 * int(counts_Q.sum())
        rows += _rows_of("plain", name, truth, sparse, num_bytes, case.keys)
    return rows


def _written(
    teacher: Teacher,
    found: Neighbours,
    positions_Q: np.ndarray,
    temperature: float,
    mass: float,
    encoding: Any,
    work: Path,
) -> tuple[SparseRows, int]:
    """(rows as they come back from a shard, bytes of the shard and its index)."""
    keys = teacher.keys
    vocab_size = keys.manifest.vocab_size
    dtype = token_dtype(vocab_size)
    order_V = frequency_order(np.bincount(keys.read("values"), minlength=vocab_size), dtype=dtype)
    blocks = []
    for block in split_blocks(len(positions_Q), keys.manifest.block_size):
        part = Neighbours(ids_QK=found.ids_QK[slice(*block)], distances_QK=found.distances_QK[slice(*block)])
        rows = teacher.rows(part, positions_Q[slice(*block)], Weighting(temperature=temperature), mass)
        blocks.append(pack_block(block.start, rows, dtype=dtype, encoding=encoding, order_V=order_V))
    path = work / shard_name(0, len(positions_Q))
    write_shard(path, work / index_name(path.name), blocks)
    num_bytes = path.stat().st_size + (work / index_name(path.name)).stat().st_size
    written = SparseRows.join([unpack_block(block, encoding, order_V) for block in blocks])
    return written.astype(np.int64, np.float64), num_bytes


def _rows_of(
    arm: str,
    name: str,
    truth: SparseRows,
    found: SparseRows,
    num_bytes: int,
    keys: Keys,
) -> list[Row]:
    far = compare_rows(truth, found, keys.manifest.vocab_size)
    num_rows = found.num_rows
    return [
        row_of(arm, f"tv_{name}", "total variation", [float(far.total_variation_Q.mean())]),
        row_of(arm, f"divergence_{name}", "nats", [float(far.divergence_Q.mean())]),
        row_of(arm, f"bytes_per_token_{name}", "B", [num_bytes / num_rows]),
        row_of(arm, f"entries_per_token_{name}", "entries", [len(found.ids) / num_rows]),
    ]


def _fit(squared_QK: np.ndarray, valid_QK: np.ndarray, config: Any) -> dict[str, float]:
    some = slice(None, None, max(1, len(squared_QK) // 1024))
    squared_QK, valid_QK = squared_QK[some], valid_QK[some]
    soft, sharp = (
        fit_weighting("softmax", squared_QK, valid_QK, perplexity).temperature
        for perplexity in (config.soft_perplexity, config.sharp_perplexity)
    )
    low, high = sharp / 64, sharp  # the arithmetic mean is the larger, so its temperature is the lower
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        perplexity = float(
            weight_perplexity(Weighting(temperature=middle).weights(squared_QK, valid_QK)).mean()
        )
        low, high = (low, middle) if perplexity > config.sharp_perplexity else (middle, high)
        if high / low < 1 + 1e-4:
            break
    return {"soft": soft, "sharp": sharp, "sharp_mean": (low * high) ** 0.5}
