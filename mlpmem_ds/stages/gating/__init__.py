"""`fit_gate`: the weight of each memory at each token, learned from tuning splits. Read in this order:

- `config.py`: the flags
- `fit_gate.py`: the stage: score, fit, describe
- `inputs.py`: base, memories (or a second model) and texts, opened and checked
- `fitting.py`: stored scores → rows of each text → the fitted gate and what it is worth on each text

The gates are in `models/gates.py`, the fit in `models/gate_fit.py`; the scores are made by the units of
`evaluate`, which also reports what a gate is worth on a test split.
"""
