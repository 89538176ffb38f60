"""Neighbour search: which stored keys are nearest to a query, however they are searched. Read in this order:

- `neighbour_search.py`: the protocol `NeighbourSearch`, and `open_search` that opens one of three by its name
- `exact_search.py`: `exact`, all keys, a block of the mapped files at a time
- `list_search.py`: `lists`, all keys of the lists that a query probes
- `shard_lists.py`: the lists of an index shard, with or without codes
- `key_lists.py`, `config.py`: the directory of keys in the order of the lists, which list search reads
- `list_owners.py`: `lists` by ranks that were launched together, each with a group of the lists
- `index_search.py`: `index`, what faiss finds by its own codes, distances computed again from the keys
- `verification.py`: keys and index compared with their checksums, by units of the stage that searches them
- `knn_scorer.py`: neighbours → log-probabilities of tokens, for the kNN arms of `evaluate`

`write_targets`, its audit, the audit of `extract_keys` and the kNN arms of `evaluate` search through these.
"""
