"""`extract_keys`: corpus → keys, values and memory inputs, from one pass of the frozen base.

Read in this order:
- `config.py`: the flags
- `extract_keys.py`: `run`: the stage from its inputs to its manifest
- `inputs.py`: the bases, loaded and checked against the corpus
- `plan.py`: the units, and bytes that the keys will take, reported before the start
- `readings.py`: the rows of a unit, batch by batch
- `rows.py`: states of a batch → rows of the arrays; `unit_files.py`: the files of a unit
- `codec.py`: the sample that fits the int8 codec
- `audit.py`: targets of some stored keys against those of the raw keys
"""
