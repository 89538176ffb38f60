"""Pipeline: keys → **inverted-file index** → targets and evaluation. The only file that imports faiss.

Vectors are int8 codes (as float32 inside faiss) or raw float keys. For codes the coarse centroids are rounded
to int8 while they are trained and before any list is filled: then every comparison that places a key or
chooses a query's lists is of exact integers, the same for any batch, number of threads and machine, with ties
to the lower list number. Faiss sees those centroids as its ordinary coarse quantizer. Raw keys, and factories
that transform the vectors first (OPQ, PCA), go through float32 in fixed batches.

Shape legend: N vectors, Q queries, D dimensions, L lists, P probed lists of a query, K neighbours, S shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import numpy as np
import torch

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.maths.centroids import (
    ITERATIONS,
    TWO_LEVEL_ABOVE,
    integer_centroids,
    nearest_centroids,
    two_level_centroids,
)

Array: TypeAlias = np.ndarray[Any, Any]
Index: TypeAlias = Any  # faiss.Index; its Python classes carry no types

POINTS_PER_CENTROID = 64  # faiss warns below 39 and samples down above 256
_MIN_POINTS_PER_CENTROID = 39
_MIN_KEYS_PER_LIST = 192
_ID_BYTES = 8
_CODE_ITERATIONS = 6  # of the product quantizer, whose training costs most: .7 s each at 64 x 8 bits
_CODE_TRAINING_VECTORS = (
    1 << 16
)  # that faiss trains its codes on; a product quantizer takes 64 for each of its centroids
_FILL_ROWS = 1 << 14  # vectors at hand as float32 while a shard is filled


def choose_factory(num_vectors: int, dim: int, memory_bytes: int | None = None) -> tuple[str, str]:
    """The factory string for N vectors of D dimensions in this memory (None: enough), and the reason in
    words.

    Lists: the power of two nearest to 4·sqrt(N), but at least 192 keys a list, so that 64 training points a
    list are at most a third of the keys. Codes: one byte for each 4 dimensions, down to 16 while the index
    would fill more than half of the memory; half a byte, or the vector itself, where there are too few keys
    to train a product quantizer.
    """
    wanted = 2 ** round(np.log2(4 * np.sqrt(max(num_vectors, 1))))
    most = max(1, num_vectors // _MIN_KEYS_PER_LIST)
    num_lists = min(wanted, 2 ** (most.bit_length() - 1))
    reason = f"{num_vectors:,} keys: {num_lists} lists of {num_vectors / num_lists:.0f} keys"
    bits = next((bits for bits in (8, 4) if num_vectors >= _MIN_POINTS_PER_CENTROID * 2**bits), 0)
    if not bits:
        return f"IVF{num_lists},Flat", f"{reason}; too few to train a product quantizer, so whole vectors"
    divisors = [
        parts for parts in range(max(1, dim // 4), max(1, dim // 16) - 1, -1) if dim % parts == 0
    ] or [1]
    parts = divisors[0]
    if memory_bytes is not None:
        fitting = (
            parts for parts in divisors if 2 * num_vectors * (parts * bits // 8 + _ID_BYTES) <= memory_bytes
        )
        parts = next(fitting, divisors[-1])
        if parts != divisors[0]:
            reason += (
                f"; {divisors[0]} bytes a key would fill more than half of {memory_bytes / 1e9:.1f} GB of"
                " memory"
            )
    suffix = "" if bits == 8 else f"x{bits}"
    return (
        f"IVF{num_lists},PQ{parts}{suffix}",
        f"{reason}; {bits} bits for each {dim // parts} of {dim} dimensions",
    )


def index_bytes(factory: str, dim: int, num_vectors: int, num_shards: int) -> int:
    """Bytes of an index directory: codes and ids, and in each file the quantizers and two counts a list."""
    ivf = _inverted_file(_make(factory, dim))
    quantizers = ivf.nlist * dim * 4 + (ivf.pq.M * ivf.pq.ksub * ivf.pq.dsub * 4 if hasattr(ivf, "pq") else 0)
    return num_vectors * (ivf.code_size + _ID_BYTES) + (num_shards + 1) * (quantizers + 16 * ivf.nlist)


def num_gpus() -> int:
    """GPUs that this build of faiss can use: 0 with faiss-cpu."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else 0


def check_factory(factory: str, dim: int, num_vectors: int) -> int:
    """Make sure that `factory` gives an inverted file that N vectors of D dimensions can train; return its
    number of lists.

    Raises:
        ValueError: with the remedy.
    """
    index = _make(factory, dim)
    ivf, needed = _inverted_file(index), _max_centroids(index)
    if num_vectors < needed:
        raise ValueError(
            f"factory {factory!r} needs at least {needed:,} keys to train and there are {num_vectors:,}: "
            "choose fewer lists (IVF…) or fewer bits (PQ…x4), or auto"
        )
    return int(ivf.nlist)


def num_training_vectors(factory: str, dim: int) -> int:
    """How many vectors training makes use of: 64 for each centroid."""
    return POINTS_PER_CENTROID * _max_centroids(_make(factory, dim))


def _max_centroids(index: Index) -> int:
    """Of the coarse quantizer, the code's, and those of the 8-bit code that OPQ trains its rotation with."""
    ivf = _inverted_file(index)
    quantizer = getattr(ivf, "pq", None)
    chain: Any = index.chain if isinstance(index, faiss.IndexPreTransform) else None
    steps = [
        faiss.downcast_VectorTransform(chain.at(number)) for number in range(chain.size() if chain else 0)
    ]
    rotates = any(isinstance(step, faiss.OPQMatrix) for step in steps)
    return int(max(ivf.nlist, 0 if quantizer is None else quantizer.ksub, 256 if rotates else 0))


def train(vectors_ND: Array, factory: str, *, seed: int = 0, two_level_above: int = TWO_LEVEL_ABOVE) -> Index:
    """Train the coarse quantizer and the code of an empty index on a sample; int8 vectors give integer
    centroids.

    Above `two_level_above` lists the coarse quantizer is trained in two levels.
    """
    index = _make(factory, vectors_ND.shape[1])
    ivf = _inverted_file(index)
    _bound(ivf.cp, seed, ITERATIONS)
    if hasattr(ivf, "pq"):
        _bound(ivf.pq.cp, seed, _CODE_ITERATIONS)
    if hasattr(ivf, "do_polysemous_training"):
        ivf.do_polysemous_training = False  # it only orders the codes for a Hamming filter, in 80 s of the 90
    if hasattr(ivf, "use_precomputed_table"):
        ivf.use_precomputed_table = (
            -1
        )  # nlist x M x 1 kB that only a search reads; it is made when the index is read
    stride = max(1, len(vectors_ND) // max(_CODE_TRAINING_VECTORS, ivf.nlist))
    if vectors_ND.dtype == np.int8 and not isinstance(index, faiss.IndexPreTransform):
        centroids_LD = integer_centroids(
            vectors_ND, ivf.nlist, seed=seed, device=_device(), two_level_above=two_level_above
        ).astype(np.float32)
        _set_centroids(ivf, centroids_LD)
        vectors_ND = vectors_ND[::stride]  # what is left to train is the code
    elif ivf.nlist > two_level_above:
        _train_transforms(index, vectors_ND[::stride])
        _set_centroids(ivf, _two_level_centroids(_transform(index, vectors_ND), ivf.nlist, seed))
        vectors_ND = vectors_ND[::stride]
    elif num_gpus():
        on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(ivf.d))
        ivf.clustering_index = on_gpus
    index.train(vectors_ND.astype(np.float32))
    ivf.clustering_index = None  # it is not written, and nothing trains any more
    return index


def _set_centroids(ivf: Any, centroids_LD: Array) -> None:
    ivf.quantizer.train(centroids_LD)
    ivf.quantizer.add(centroids_LD)


def _train_transforms(index: Index, vectors_ND: Array) -> None:
    """Train what comes before the inverted file, each step on what the one before it makes."""
    chain: Any = index.chain if isinstance(index, faiss.IndexPreTransform) else None
    vectors_ND = vectors_ND.astype(np.float32)
    for number in range(chain.size() if chain else 0):
        step = faiss.downcast_VectorTransform(chain.at(number))
        if not step.is_trained:
            step.train(vectors_ND)
        vectors_ND = step.apply(vectors_ND)


def _two_level_centroids(vectors_ND: Array, num_lists: int, seed: int) -> Array:
    """k-means of faiss in two levels over floats: float32 [L, D]."""

    def cluster(part_ND: Array, count: int) -> Array:
        kmeans = faiss.Kmeans(part_ND.shape[1], count, gpu=num_gpus() > 0)
        _bound(kmeans.cp, seed, ITERATIONS)
        kmeans.train(part_ND)
        return np.ascontiguousarray(kmeans.centroids)

    return two_level_centroids(np.ascontiguousarray(vectors_ND, np.float32), num_lists, cluster)


def fill(index: Index, vectors_ND: Array, ids_N: Array) -> None:
    """Add vectors under their ids (int64), each to its nearest list; a fixed number of them is at hand as
    float32."""
    ids_N = np.ascontiguousarray(ids_N, dtype=np.int64)
    for start in range(0, len(ids_N), _FILL_ROWS):
        rows = slice(start, start + _FILL_ROWS)
        _fill(index, vectors_ND[rows], ids_N[rows])


def _fill(index: Index, vectors_ND: Array, ids_N: Array) -> None:
    ivf = _inverted_file(index)
    if isinstance(ivf, faiss.IndexIVFFastScan):  # its packed lists can only be filled by its own method
        index.add_with_ids(vectors_ND.astype(np.float32), ids_N)
        return
    lists_N = np.ascontiguousarray(assign(index, vectors_ND, 1)[:, 0])
    transformed_ND = np.ascontiguousarray(_transform(index, vectors_ND), dtype=np.float32)
    ivf.add_core(len(ids_N), faiss.swig_ptr(transformed_ND), faiss.swig_ptr(ids_N), faiss.swig_ptr(lists_N))
    index.ntotal = ivf.ntotal


def assign(index: Index, vectors_QD: Array, nprobe: int) -> Array:
    """The `nprobe` nearest lists of each vector, nearest first, ties to the lower number: int64 [Q, P].

    Where there are fewer lists, all of them: P = min(nprobe, L).
    """
    return _nearest_lists(index, _transform(index, vectors_QD), nprobe)[0]


def search(shards: Sequence[Index], queries_QD: Array, k: int, nprobe: int) -> tuple[Array, Array]:
    """The k nearest of all shards by the index's own (approximate) distances, in the order (distance, id).

    Returns:
        squared distances, float32 [Q, K], infinite where missing, and ids, int64 [Q, K], -1 where missing.
    """
    transformed_QD = _transform(shards[0], queries_QD)
    lists_QP, coarse_QP = _nearest_lists(shards[0], transformed_QD, nprobe)
    queries_QD = np.ascontiguousarray(transformed_QD, dtype=np.float32)
    found = []
    for shard in shards:
        ivf = _inverted_file(shard)
        ivf.nprobe = lists_QP.shape[1]
        found.append(ivf.search_preassigned(queries_QD, k, lists_QP, coarse_QP))
    distances, ids = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return _merge(distances, ids, k)


def join(shards: Sequence[Index]) -> Index:
    """One index of all the shards' keys, in memory; the shards are left empty.

    `search` then gives the same result sooner: the tables of distances to a list's code words are made once a
    probed list, not once for each shard (4 shards, 1,024 lists, 32 probes: 1.04 ms of processor time a query
    before, 0.48 after).
    """
    first, *others = shards
    for other in others:
        first.merge_from(other, 0)
    return first


def keep_first(index: Index, num_keys: int) -> Index:
    """The index without the keys whose ids are `num_keys` and more; changed in place."""
    index.remove_ids(faiss.IDSelectorRange(num_keys, np.iinfo(np.int64).max))
    return index


def list_sizes(index: Index) -> Array:
    """Vectors in each list, int64 [L]."""
    lists = _inverted_file(index).invlists
    return np.array([lists.list_size(number) for number in range(lists.nlist)], dtype=np.int64)


def ids_of_list(index: Index, number: int) -> Array:
    """Ids of the vectors in a list, int64, in the order in which they were added."""
    return _ids_of_list(_inverted_file(index).invlists, number)


def inverted_lists(shards: Sequence[Index]) -> tuple[Array, Array]:
    """The lists of all shards joined: offsets, int64 [L + 1], and ids, int64 [N], ascending within a list."""
    numbers, ids = [], []
    num_lists = _inverted_file(shards[0]).nlist
    for shard in shards:
        sizes_L = list_sizes(shard)
        numbers.append(np.repeat(np.arange(num_lists), sizes_L))
        ids += [ids_of_list(shard, int(number)) for number in np.flatnonzero(sizes_L)]
    numbers_N, ids_N = np.concatenate(numbers), np.concatenate(ids) if ids else np.empty(0, np.int64)
    offsets_L1 = np.zeros(num_lists + 1, np.int64)
    np.cumsum(np.bincount(numbers_N, minlength=num_lists), out=offsets_L1[1:])
    return offsets_L1, ids_N[np.lexsort((ids_N, numbers_N))]


def write_index(index: Index, path: Path) -> None:
    faiss.write_index(index, str(path))


def read_index(path: Path, *, for_search: bool = True, mapped: bool = False) -> Index:
    """Read an index; without `for_search` the tables that speed its own search up are left out.

    `mapped` leaves the lists in the file, to be read when asked for: for looking up ids, not for searching.

    Raises:
        DamagedDataError: faiss cannot read it.
    """
    flags = 0 if for_search and not mapped else faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
    try:
        return faiss.read_index(str(path), flags | (faiss.IO_FLAG_MMAP if mapped else 0))
    except RuntimeError as error:
        raise DamagedDataError(
            f"{path} is not an index that faiss {faiss.__version__} can read ({error}): "
            "run the stage that made it again, it remakes only what is damaged"
        ) from error


def set_num_threads(count: int) -> None:
    """How many threads faiss uses in this process."""
    faiss.omp_set_num_threads(count)


def _make(factory: str, dim: int) -> Index:
    try:
        return faiss.index_factory(dim, factory)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        raise ValueError(
            f"factory {factory!r} does not fit vectors of {dim} dimensions ({reason}): choose another, "
            "such as IVF1024,PQ64, or auto"
        ) from error


def _inverted_file(index: Index) -> Any:
    """The IVF part of an index, of the class that has its methods."""
    inner: Any = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if not isinstance(inner, faiss.IndexIVF):
        raise ValueError(
            f"the factory gives a {type(inner).__name__}, not an inverted file: it must hold IVF, such as "
            "IVF1024,PQ64, or be auto"
        )
    return inner


def _device() -> torch.device:
    """Where vectors are compared with centroids."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bound(parameters: Any, seed: int, iterations: int) -> None:
    """Make a k-means of faiss repeatable and of known cost; it warns on standard error unless few points are
    allowed."""
    parameters.niter, parameters.seed = iterations, seed
    parameters.min_points_per_centroid, parameters.max_points_per_centroid = 1, POINTS_PER_CENTROID


def _transform(index: Index, vectors_ND: Array) -> Array:
    """What the inverted file sees of the vectors: themselves, or what the transforms before it make of
    them."""
    chain: Any = index.chain if isinstance(index, faiss.IndexPreTransform) else None
    for number in range(chain.size() if chain else 0):
        vectors_ND = faiss.downcast_VectorTransform(chain.at(number)).apply(vectors_ND.astype(np.float32))
    return vectors_ND


def _nearest_lists(index: Index, vectors_QD: Array, nprobe: int) -> tuple[Array, Array]:
    """(list numbers int64, squared distances float32), both [Q, P], of vectors as the inverted file sees
    them."""
    ivf = _inverted_file(index)
    centroids_LD = ivf.quantizer.reconstruct_n(0, ivf.nlist)
    if vectors_QD.dtype == np.int8 and (centroids_LD == centroids_LD.astype(np.int8)).all():
        centroids_LD = centroids_LD.astype(np.int8)
    vectors = torch.from_numpy(
        np.require(vectors_QD, requirements=["C", "W"])
    )  # a read-only memory map is copied
    return nearest_centroids(vectors, torch.from_numpy(centroids_LD).to(_device()), nprobe)


def _merge(distances_QC: Array, ids_QC: Array, k: int) -> tuple[Array, Array]:
    """The k least (distance, id) of each row, sorted; where an id is -1 there is none."""
    missing_QC = ids_QC < 0
    distances_QC = np.where(missing_QC, np.float32(np.inf), np.maximum(distances_QC, 0))
    if ids_QC.max(initial=0) >= 1 << 32:
        order_QK = np.lexsort((ids_QC, distances_QC), axis=1)[:, :k]
        return np.take_along_axis(distances_QC, order_QK, axis=1), np.take_along_axis(
            ids_QC, order_QK, axis=1
        )
    # A non-negative float orders like its bits: one integer sort, eight times as fast.
    packed_QC = (distances_QC.view(np.int32).astype(np.int64) << 32) | np.where(
        missing_QC, 0xFFFFFFFF, ids_QC
    )
    if k < packed_QC.shape[1]:
        packed_QC.partition(k - 1, axis=1)
    packed_QK = np.sort(packed_QC[:, :k], axis=1)
    distances_QK = (packed_QK >> 32).astype(np.int32).view(np.float32)
    return distances_QK, np.where(np.isinf(distances_QK), -1, packed_QK & 0xFFFFFFFF)


def _ids_of_list(lists: Any, number: int) -> Array:
    pointer = lists.get_ids(number)
    try:
        return np.array(faiss.rev_swig_ptr(pointer, lists.list_size(number)), dtype=np.int64)
    finally:
        lists.release_ids(number, pointer)
