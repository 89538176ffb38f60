"""Pipeline: keys → lists → **code words** → index. The product quantizer's, trained by all ranks together.

A product quantizer cuts a vector into M parts and has 256 code words for each. faiss trains them one part
after another, each by a k-means of its own on the residuals (vector minus centroid of its list). So a product
quantizer over some of the parts has the same code words for them, bit for bit: each rank trains one.

Shape legend: N vectors, D dimensions, C columns of the parts of a rank.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.engines.faiss_library import faiss

Array: TypeAlias = np.ndarray[Any, Any]

_SAMPLE_SEED = 1234  # of fvecs_maybe_subsample, with which faiss draws what it trains the codes on


def are_trained_together(ivf: Any) -> bool:
    """Whether `train_code_words` can train this inverted file: IVF-PQ with 8-bit codes. Fewer bits cost next
    to nothing, and other kinds train more than code words."""
    return type(ivf) is faiss.IndexIVFPQ and ivf.by_residual and ivf.pq.nbits == 8


def train_code_words(ivf: Any, vectors_ND: Array, ranks: Ranks) -> None:
    """Train the code of an inverted file that has its centroids, with the bytes of its own `train`.

    All ranks call this, with the same settings in `ivf.pq.cp`. Rank 0 has the centroids and all vectors
    (int8), the others have none; rank 0 gets the code words.
    """
    code = ivf.pq
    residuals_ND = _residuals(ivf, vectors_ND) if ranks.rank == 0 else np.empty((0, ivf.d), np.float32)
    edges = [rank * code.M // ranks.size * code.dsub for rank in range(ranks.size + 1)]
    parts = [np.ascontiguousarray(residuals_ND[:, start:stop]) for start, stop in pairwise(edges)]
    words = ranks.gather(_code_words(code, ranks.exchange(parts)[0]))
    if ranks.rank == 0:
        faiss.copy_array_to_vector(np.concatenate(words), code.centroids)
        ivf.is_trained = True


def _residuals(ivf: Any, vectors_ND: Array) -> Array:
    """What the `train` of faiss gives its product quantizer: of no more vectors than that makes use of."""
    most = ivf.train_encoder_num_vectors()
    if len(vectors_ND) > most:
        order_N = np.empty(len(vectors_ND), np.int32)
        faiss.rand_perm(faiss.swig_ptr(order_N), len(order_N), _SAMPLE_SEED)
        vectors_ND = vectors_ND[order_N[:most]]
    floats_ND = np.ascontiguousarray(vectors_ND, np.float32)
    _, lists_N1 = ivf.quantizer.search(floats_ND, 1)
    return floats_ND - ivf.quantizer.reconstruct_batch(lists_N1[:, 0])


def _code_words(code: Any, residuals_NC: Array) -> Array:
    """Of the parts whose columns these are: float32, flat, as faiss keeps them."""
    num_columns = residuals_NC.shape[1]
    if not num_columns:
        return np.empty(0, np.float32)  # more ranks than parts
    own = faiss.ProductQuantizer(num_columns, num_columns // code.dsub, code.nbits)
    own.cp = code.cp
    own.train(np.ascontiguousarray(residuals_NC))
    words: Array = faiss.vector_to_array(own.centroids)
    return words
