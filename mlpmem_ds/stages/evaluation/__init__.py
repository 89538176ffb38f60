"""`evaluate`: base, retriever, memory and controls on text that none was trained on. Read in this order:

- `config.py`: the flags
- `evaluate.py`: the stage, from inputs to the report
- `inputs.py`: the text and the arms, opened and checked; `splits.py`: the text; `arms/`: the ways to predict
- `forward_pass.py`: one model's pass over a block of text, which serves every arm that reads it
- `units.py`: the units of work; each arm leaves its scores of a unit in two files
- `stored_scores.py`, `evidence.py`: score files → arrays, and what a gate reads of them
- `mixing.py`: memories weighed anew, by a gate or as a bank
- `results.py`: score files → `eval.json`, page and plots (`stages/report` makes the figures)
- `token_kinds.py`: the groups of tokens by which the report says where an arm wins and loses
- `speed.py`, `samples.py`: speed against the size of the datastore; text continued with the memory
"""
