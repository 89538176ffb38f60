"""The faiss that is installed: faiss-cpu, or faiss-gpu, whose k-means of floats then runs on this rank's GPU.

Only that does. Keys are placed in lists by exact integers (maths/centroids.py), on a GPU too. Codes are made
by faiss on the CPU: a GPU's float32 differs in the last bits, so that units of one index would have other
bytes on another machine.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch

from mlpmem_ds.core.errors import UserError

Array: TypeAlias = np.ndarray[Any, Any]

POINTS_PER_CENTROID = 64  # faiss warns below 39 and samples down above 256


def _import_faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ModuleNotFoundError as error:
        raise UserError(
            "faiss is not installed: pip install '.[cpu]' brings faiss-cpu, pip install '.[gpu]' faiss-gpu"
            " and flash-attn for a machine with an NVIDIA GPU (one of both, they overwrite each other)"
        ) from error


faiss = _import_faiss()


def set_num_threads(count: int) -> None:
    """How many threads faiss uses in this process."""
    faiss.omp_set_num_threads(count)


def gpu_index(dim: int, device: torch.device) -> Any:
    """An empty exact index of faiss on a GPU, for k-means; None where the device is none or this is
    faiss-cpu."""
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        return None
    place = faiss.GpuIndexFlatConfig()
    place.device = device.index or 0
    return faiss.GpuIndexFlatL2(_resources(), dim, place)


@cache
def _resources() -> Any:
    """Streams and scratch memory of this process on its GPU, made once."""
    return faiss.StandardGpuResources()


def bound(parameters: Any, seed: int, iterations: int) -> None:
    """Make a k-means of faiss repeatable and of known cost; it warns on standard error unless few points are
    allowed."""
    parameters.niter, parameters.seed = iterations, seed
    parameters.min_points_per_centroid, parameters.max_points_per_centroid = 1, POINTS_PER_CENTROID


def cluster(vectors_ND: Array, count: int, *, seed: int, iterations: int, device: torch.device) -> Array:
    """k-means of faiss over float32 vectors: centroids float32 [L, D]."""
    dim = vectors_ND.shape[1]
    parameters = faiss.ClusteringParameters()
    bound(parameters, seed, iterations)
    clustering = faiss.Clustering(dim, count, parameters)
    index = gpu_index(dim, device)
    clustering.train(vectors_ND, faiss.IndexFlatL2(dim) if index is None else index)
    centroids_LD: Array = faiss.vector_to_array(clustering.centroids).reshape(count, dim)
    return centroids_LD
