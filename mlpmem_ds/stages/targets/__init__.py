"""`write_targets`: keys (and index) → sparse targets, one row for each position.

Read in this order:
- `config.py`: the flags
- `write_targets.py`: `run`: a sample, the temperature, the shards, the audit
- `inputs.py`: what is checked before anything is written
- `teacher.py`: neighbours of a position → the distribution that the memory imitates
- `units.py`: the units: what the sample shows, and the rows of a shard
- `calls.py`: shards of ranks that search together, call by call
- `audit.py`: sampled positions against exact search over all keys
"""
