"""Maths: functions from arrays to arrays, without ranks, paths or configurations. torch and NumPy only.

In the order of the pipeline:
- `similar_signatures.py`: MinHash signatures of documents → which nearly repeat others
- `codec.py`, `encoding.py`: int8 codes of keys, made on a GPU; `kmeans.py`, `centroids.py`: the coarse lists
- `distances.py`, `neighbours.py`: exact distances; the record of neighbours and what a query may not find
- `knn.py`: exact and list search, on a CPU here, on a GPU in `knn_on_device.py` and `lists_on_device.py`
- `device_memory.py`, `hidden_on_device.py`, `list_tiles.py`: parts of the searches on a GPU
- `exact_limit.py`: up to how many keys exact search is the right choice
- `listed_keys.py`, `search_blocks.py`, `candidates.py`, `rescoring.py`: parts of these searches
- `weighting.py`, `targets.py`, `sparse_rows.py`: neighbours → weights → sparse rows
- `target_distance.py`: how far targets are from the truth
- `sparse_targets.py`, `sparse_loss.py`, `sparse_chunk.py`, `products.py`: the training loss;
  `based_chunk.py`: the same where it needs the base's whole distribution
- `head_scores.py`, `scores.py`: log-probabilities of tokens; the numbers of a report
- `kernels`: Triton twins of some of these
"""
