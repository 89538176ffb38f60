"""`mirror`: directories of a run to an object store and back.

- `config.py`: the flags
- `mirror.py`: push, pull, watch, verify, and what the cache holds
"""
