"""`build_index`: keys → a sharded inverted-file index that stock faiss reads.

Read in this order:
- `config.py`: the flags
- `build_index.py`: `run`: train once, fill the shards
- `factory.py`: which faiss factory fits so many keys, and what training it costs
"""
