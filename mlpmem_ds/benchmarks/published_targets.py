"""The published way to make kNN targets, written anew: what `targets` compares with.

Stock faiss search batch by batch, the first hit dropped, the index's approximate distances into a softmax, a
dense batch x vocabulary array, a Python loop that keeps p > 1e-8 of each row, padding to the widest row, rows
of int32 ids and float16 probabilities appended to one file.

Shape legend: N keys, Q queries, D numbers in a key, K neighbours, V vocabulary, W widest row of a batch.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import torch

from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import Keys

_MIN_PROBABILITY = 1e-8


def write_published(
    keys: Keys,
    index: faiss.Index,
    k: int,
    temperature: float,
    output: Path,
    *,
    num_positions: int,
    batch: int,
) -> None:
    """Write the targets of the first positions, in order."""
    codes_ND, values_N = keys.read("keys"), keys.read("values")
    with open(output, "wb") as stream:
        for start in range(0, num_positions, batch):
            queries_QD = codes_ND[start : min(start + batch, num_positions)]
            rows = published_rows(keys, index, queries_QD, values_N, k, temperature)
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


def published_hits(index: faiss.Index, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(squared distances of the stored vectors, ids): k + 1 hits, the first taken for the query itself."""
    distances_QK, ids_QK = index.search(queries_QD.astype(np.float32), k + 1)
    return distances_QK[:, 1:], ids_QK[:, 1:]


def published_rows(
    keys: Keys, index: faiss.Index, queries_QD: np.ndarray, values_N: np.ndarray, k: int, temperature: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32, probabilities float16) of each query."""
    distances_QK, ids_QK = published_hits(index, queries_QD, k)
    weights_QK = torch.softmax(-torch.from_numpy(distances_QK) * (keys.scale**2 / temperature), dim=1)
    values_QK = torch.from_numpy(values_N[ids_QK].astype(np.int64))
    dense_QV = torch.zeros(len(queries_QD), keys.manifest.vocab_size)
    dense_QV.scatter_add_(1, values_QK, weights_QK)
    dense_QV /= dense_QV.sum(dim=1, keepdim=True)
    rows = []
    for dense_V in dense_QV.numpy():  # NumPy: torch would wake all its threads for each row
        ids = np.flatnonzero(dense_V > _MIN_PROBABILITY)
        rows.append((ids.astype(np.int32), dense_V[ids].astype(np.float16)))
    return rows


def stock_index(directory: Path, nprobe: int) -> faiss.Index:
    """An index as faiss itself reads it, shards merged, ready to search."""
    first, *others = [faiss.read_index(str(path)) for path in open_index(directory).shard_paths]
    for other in others:
        first.merge_from(other, 0)
    faiss.extract_index_ivf(first).nprobe = nprobe
    return first
