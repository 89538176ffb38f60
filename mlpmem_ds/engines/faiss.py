"""The inverted-file index of faiss over keys, and how its coarse lists are chosen.

Vectors are int8 codes (as float32 inside faiss) or raw float keys. For codes the coarse centroids are rounded
to int8 while they are trained and before any list is filled: then every comparison that places a key or
chooses a query's lists is of exact integers, the same for any batch, number of threads and machine, with ties
to the lower list number. Faiss sees those centroids as its ordinary coarse quantizer. Raw keys, and factories
that transform the vectors first (OPQ, PCA), go through float32 in fixed batches.

Shape legend: N vectors, Q queries, D dimensions, L lists, P probed lists of a query, K neighbours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from mlpmem_ds.core.errors import DamagedDataError, first_line
from mlpmem_ds.engines.coarse_quantizers import CoarseQuantizer, FlatQuantizer, open_quantizer
from mlpmem_ds.engines.code_words import are_trained_together, train_code_words
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.engines.faiss_library import POINTS_PER_CENTROID, bound, cluster, faiss, gpu_index
from mlpmem_ds.maths.distances import CPU
from mlpmem_ds.maths.kmeans import (
    ITERATIONS,
    TWO_LEVEL_ABOVE,
    Share,
    integer_centroids,
    two_level_centroids,
)

Array: TypeAlias = np.ndarray[Any, Any]

_ID_BYTES = 8
_CODE_ITERATIONS = 6  # of the product quantizer, whose training costs most: .7 s each at 64 x 8 bits
# Vectors that faiss trains its codes on; a product quantizer takes 64 for each of its centroids.
_CODE_TRAINING_VECTORS = 1 << 16
_FILL_ROWS = 1 << 14  # vectors that are float32 at a time while a shard is filled


class Index:
    """Vectors under ids, each as a code in the list of its nearest centroid.

    Vectors are compared with the centroids on ``device``, which holds these from the first use on; codes and
    ids are in the host's memory. `make` gives an empty one, `train` its lists and codes, `fill` its vectors;
    the files are faiss's own.
    """

    def __init__(self, raw: Any, device: torch.device = CPU) -> None:
        """Raises ValueError where the index has no inverted lists of a kind that is known here."""
        inner: Any = faiss.downcast_index(raw.index) if isinstance(raw, faiss.IndexPreTransform) else raw
        if not isinstance(inner, faiss.IndexIVF):
            raise ValueError(
                f"the factory gives a {type(inner).__name__}, not an inverted file: it must hold IVF, such as"
                " IVF1024,PQ64, or be auto"
            )
        self.raw, self._device = raw, device
        self._ivf: Any = inner  # its Python classes carry no types

    @classmethod
    def make(cls, factory: str, dim: int, device: torch.device = CPU) -> Index:
        """An empty index for vectors of D dimensions.

        Raises:
            ValueError: faiss does not read the factory, or it gives no inverted file; with the remedy.
        """
        try:
            raw = faiss.index_factory(dim, factory)
        except RuntimeError as error:
            reason = first_line(error).rpartition(": ")[2]
            raise ValueError(
                f"factory {factory!r} does not fit vectors of {dim} dimensions ({reason}): choose another, "
                "such as IVF1024,PQ64, or auto"
            ) from error
        index = cls(raw, device)
        _ = index._quantizer
        return index

    @classmethod
    def read(cls, path: Path, *, mapped: bool = False, device: torch.device = CPU) -> Index:
        """Read an index, without the table of `prepare_search`.

        `mapped` leaves the lists in the file, to be read when asked for: for looking up ids, not for
        searching.

        Raises:
            DamagedDataError: faiss cannot read it.
        """
        flags = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE | (faiss.IO_FLAG_MMAP if mapped else 0)
        try:
            return cls(faiss.read_index(_utf8(path), flags), device)
        except RuntimeError as error:
            raise DamagedDataError(
                f"{path} is not an index that faiss {faiss.__version__} can read ({error}): "
                "run the stage that made it again, it remakes only what is damaged"
            ) from error

    @classmethod
    def join(cls, shards: Iterable[Index]) -> Index:
        """One index of all the shards' vectors, in memory; the shards are left empty. Shards that are read
        one by one are in memory one by one.

        The tables of distances to a list's code words are then made once a probed list, not once for each
        shard (4 shards, 1,024 lists, 32 probes: 1.04 ms of processor time a query in shards, 0.48 joined).
        """
        shards = iter(shards)
        first = next(shards)
        for other in shards:
            first.raw.merge_from(other.raw, 0)
            del other  # before the next is read: 16 shards of 66 MB took 151 MB, and 89 one by one
        return first

    def prepare_search(self) -> None:
        """Make the table that speeds up searches of an IVF-PQ index; when all vectors are in one index, since
        each index has its own."""
        if hasattr(self._ivf, "precompute_table"):
            self._ivf.use_precomputed_table = 0  # faiss chooses; training has left that none is made
            self._ivf.precompute_table()

    def write(self, path: Path) -> None:
        faiss.write_index(self.raw, _utf8(path))

    @property
    def num_lists(self) -> int:
        return int(self._ivf.nlist)

    @property
    def num_vectors(self) -> int:
        return int(self.raw.ntotal)

    @property
    def min_training_vectors(self) -> int:
        """The most centroids of one k-means: of the lists, of the code, and of the 8-bit code that OPQ trains
        its rotation with."""
        code = getattr(self._ivf, "pq", None)
        rotates = any(isinstance(step, faiss.OPQMatrix) for step in self._transforms())
        return int(max(self._ivf.nlist, 0 if code is None else code.ksub, 256 if rotates else 0))

    @property
    def num_training_vectors(self) -> int:
        """How many vectors training makes use of: 64 for each centroid."""
        return POINTS_PER_CENTROID * self.min_training_vectors

    def num_bytes(self, num_vectors: int, num_files: int) -> int:
        """Of so many files that hold so many vectors together: codes and ids, and in each file the quantizers
        and two counts a list."""
        code = getattr(self._ivf, "pq", None)
        quantizers = self._quantizer.num_bytes + (code.M * code.ksub * code.dsub * 4 if code else 0)
        return num_vectors * (self._ivf.code_size + _ID_BYTES) + num_files * (
            quantizers + 16 * self.num_lists
        )

    @property
    def table_bytes(self) -> int:
        """Of the table of `prepare_search`: a number a list and code word; 0 where faiss makes none."""
        ivf = self._ivf
        if not (hasattr(ivf, "precompute_table") and ivf.by_residual):
            return 0
        num_bytes = int(4 * ivf.nlist * ivf.pq.M * ivf.pq.ksub)
        return num_bytes if num_bytes <= faiss.cvar.precomputed_table_max_bytes else 0

    def train(
        self,
        sample: Array | Share,
        *,
        ranks: Ranks | None = None,
        seed: int = 0,
        two_level_above: int = TWO_LEVEL_ABOVE,
    ) -> None:
        """Train the lists and the code of an empty index on a sample [N, D], which ranks may hold together:
        then all of them call this, and the index of rank 0 is the trained one.

        int8 vectors give integer centroids; all ranks train a part of these and of the code words of IVF-PQ.
        Rank 0 trains other codes, and all for floats. Above `two_level_above` lists the centroids are trained
        in two levels.
        """
        ranks = Alone() if ranks is None else ranks
        sample = sample if isinstance(sample, Share) else Share.whole(sample)
        self._bound_training(seed)
        ivf = self._ivf
        stride = max(1, sample.total // max(_CODE_TRAINING_VECTORS, ivf.nlist))
        is_integer = sample.vectors_nD.dtype == np.int8 and not isinstance(self.raw, faiss.IndexPreTransform)
        if is_integer:
            centroids_LD = integer_centroids(
                sample,
                ivf.nlist,
                seed=seed,
                ranks=ranks,
                device=self._device,
                two_level_above=two_level_above,
            )
            sample = sample.every(stride)  # what is left to train is the code
        vectors_ND = sample.on_first(ranks)
        if is_integer and ranks.rank == 0:
            self._set_centroids(centroids_LD.astype(np.float32))
        if is_integer and ranks.size > 1 and are_trained_together(ivf):
            train_code_words(ivf, vectors_ND, ranks)
        elif ranks.rank == 0:
            self._train_here(vectors_ND, stride, seed, two_level_above)
        vars(self).pop("_quantizer", None)  # it may have read other centroids

    def fill(self, vectors_ND: Array, ids_N: Array) -> None:
        """Add vectors under their ids (int64), each to its nearest list; a fixed number of them is float32 at
        a time."""
        ids_N = np.ascontiguousarray(ids_N, dtype=np.int64)
        for start in range(0, len(ids_N), _FILL_ROWS):
            rows = slice(start, start + _FILL_ROWS)
            self._fill(vectors_ND[rows], ids_N[rows])

    def assign(self, vectors_QD: Array, nprobe: int) -> Array:
        """The `nprobe` nearest lists of each vector, nearest first, ties to the lower number: int64 [Q, P].

        Where there are fewer lists, all of them: P = min(nprobe, L). A graph quantizer may miss near ones.
        """
        return self._quantizer.nearest(self._transform(vectors_QD), nprobe)[0]

    def search(self, queries_QD: Array, k: int, nprobe: int) -> tuple[Array, Array]:
        """The k nearest by the index's own (approximate) distances, in the order (distance, id).

        Returns:
            squared distances, float32 [Q, K], infinite where missing, and ids, int64, -1 where missing.
        """
        transformed_QD = self._transform(queries_QD)
        lists_QP, coarse_QP = self._quantizer.nearest(transformed_QD, nprobe)
        self._ivf.nprobe = lists_QP.shape[1]
        queries_QD = np.ascontiguousarray(transformed_QD, dtype=np.float32)
        return _in_order(*self._ivf.search_preassigned(queries_QD, k, lists_QP, coarse_QP))

    def list_sizes(self) -> Array:
        """Vectors in each list, int64 [L]."""
        lists = self._ivf.invlists
        return np.array([lists.list_size(number) for number in range(lists.nlist)], dtype=np.int64)

    def ids_of_list(self, number: int) -> Array:
        """Ids of the vectors in a list, int64, in the order in which they were added."""
        lists = self._ivf.invlists
        pointer = lists.get_ids(number)
        try:
            return np.array(faiss.rev_swig_ptr(pointer, lists.list_size(number)), dtype=np.int64)
        finally:
            lists.release_ids(number, pointer)

    def lists(self) -> tuple[Array, Array]:
        """All lists: offsets, int64 [L + 1], and ids, int64 [N], ascending within a list."""
        offsets_L1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.list_sizes())])
        ids = [np.sort(self.ids_of_list(number)) for number in range(self.num_lists)]
        return offsets_L1, np.concatenate(ids)

    def keep_first(self, num_keys: int) -> None:
        """Remove the vectors whose ids are `num_keys` and more."""
        self.raw.remove_ids(faiss.IDSelectorRange(num_keys, np.iinfo(np.int64).max))

    @cached_property
    def _quantizer(self) -> CoarseQuantizer:
        return open_quantizer(faiss.downcast_index(self._ivf.quantizer), self.num_lists, self._device)

    def _bound_training(self, seed: int) -> None:
        """Make what faiss trains repeatable and of known cost."""
        ivf = self._ivf
        bound(ivf.cp, seed, ITERATIONS)
        if hasattr(ivf, "pq"):
            bound(ivf.pq.cp, seed, _CODE_ITERATIONS)
        if hasattr(
            ivf, "do_polysemous_training"
        ):  # it only orders the codes for a Hamming filter, in 80 s of 90
            ivf.do_polysemous_training = False
        if hasattr(ivf, "use_precomputed_table"):  # L x M x 1 kB that only a search reads
            ivf.use_precomputed_table = -1

    def _train_here(self, vectors_ND: Array, stride: int, seed: int, two_level_above: int) -> None:
        """Train what is not trained yet: floats have no centroids."""
        ivf, is_flat = self._ivf, isinstance(self._quantizer, FlatQuantizer)
        if ivf.quantizer.ntotal == 0 and (ivf.nlist > two_level_above or not is_flat):
            self._train_transforms(vectors_ND[::stride])
            levels = 2 if ivf.nlist > two_level_above else 1
            floats_ND = np.ascontiguousarray(self._transform(vectors_ND), np.float32)
            self._set_centroids(_float_centroids(floats_ND, ivf.nlist, seed, levels, self._device))
            vectors_ND = vectors_ND[::stride]
        elif ivf.quantizer.ntotal == 0:
            on_gpu = gpu_index(ivf.d, self._device)  # named: faiss keeps no reference
            ivf.clustering_index = on_gpu
        self.raw.train(vectors_ND.astype(np.float32))
        ivf.clustering_index = None  # it is not written, and nothing trains any more

    def _set_centroids(self, centroids_LD: Array) -> None:
        with _one_thread():  # several would put the edges of a graph in the order in which they are ready
            self._ivf.quantizer.train(centroids_LD)
            self._ivf.quantizer.add(centroids_LD)

    def _fill(self, vectors_ND: Array, ids_N: Array) -> None:
        ivf = self._ivf
        if isinstance(ivf, faiss.IndexIVFFastScan):  # its packed lists can only be filled by its own method
            self.raw.add_with_ids(vectors_ND.astype(np.float32), ids_N)
            return
        lists_N = np.ascontiguousarray(self.assign(vectors_ND, 1)[:, 0])
        floats_ND = np.ascontiguousarray(self._transform(vectors_ND), dtype=np.float32)
        ivf.add_core(len(ids_N), *(faiss.swig_ptr(array) for array in (floats_ND, ids_N, lists_N)))
        self.raw.ntotal = ivf.ntotal

    def _transforms(self) -> list[Any]:
        """What comes before the inverted file, in order."""
        chain: Any = self.raw.chain if isinstance(self.raw, faiss.IndexPreTransform) else None
        size = chain.size() if chain else 0
        return [faiss.downcast_VectorTransform(chain.at(number)) for number in range(size)]

    def _transform(self, vectors_ND: Array) -> Array:
        """What the inverted file sees of the vectors: themselves, or what the transforms make of them."""
        for step in self._transforms():
            vectors_ND = step.apply(vectors_ND.astype(np.float32))
        return vectors_ND

    def _train_transforms(self, vectors_ND: Array) -> None:
        """Train each transform on what the one before it makes."""
        vectors_ND = vectors_ND.astype(np.float32)
        for step in self._transforms():
            if not step.is_trained:
                step.train(vectors_ND)
            vectors_ND = step.apply(vectors_ND)


def _float_centroids(
    vectors_ND: Array, num_lists: int, seed: int, levels: int, device: torch.device
) -> Array:
    """k-means of faiss over float32 vectors, in one level or in two: float32 [L, D]."""

    def centroids_of(part: Share, count: int, _: Any) -> Array:
        return cluster(part.vectors_nD, count, seed=seed, iterations=ITERATIONS, device=device)

    share = Share.whole(vectors_ND)
    if levels == 1:
        return centroids_of(share, num_lists, None)
    return two_level_centroids(share, num_lists, centroids_of, ranks=Alone())


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    count = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(count)


def _in_order(distances_QK: Array, ids_QK: Array) -> tuple[Array, Array]:
    """The same in the order (distance, id); infinite where an id is -1, which closes the row."""
    missing_QK = ids_QK < 0
    distances_QK = np.where(missing_QK, np.float32(np.inf), np.maximum(distances_QK, 0))
    if ids_QK.max(initial=0) >= 1 << 32:
        order_QK = np.lexsort((ids_QK, distances_QK), axis=1)
        ids_QK = np.take_along_axis(ids_QK, order_QK, axis=1)
        return np.take_along_axis(distances_QK, order_QK, axis=1), ids_QK
    # A non-negative float orders like its bits: one integer sort, eight times as fast.
    packed_QK = distances_QK.view(np.int32).astype(np.int64) << 32
    packed_QK |= np.where(missing_QK, 0xFFFFFFFF, ids_QK)
    packed_QK.sort(axis=1)
    distances_QK = (packed_QK >> 32).astype(np.int32).view(np.float32)
    return distances_QK, np.where(np.isinf(distances_QK), -1, packed_QK & 0xFFFFFFFF)


def _utf8(path: Path) -> str:
    """The path as faiss takes it; a UnicodeEncodeError where it is not UTF-8, which front-ends explain."""
    text = str(path)
    text.encode()
    return text
