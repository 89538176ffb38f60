"""`build_index`: keys → a sharded inverted-file index that stock faiss reads.

Read in this order:
- `config.py`: the flags
- `build_index.py`: `run`: train once, fill the shards
- `factory.py`: which faiss factory and how many shards fit so many keys, and what training costs
- `training.py`: the sample of the keys, and training by one rank or by all together
"""
