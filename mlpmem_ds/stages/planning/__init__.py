"""`plan`: what a run will need before it starts: bytes, time, memory and GPU hours of every stage.

Read in this order:
- `config.py`: the flags
- `plan.py`: `run`: flags, model and machine → sizes → costs → a table with warnings
- `cost_model.py`: the formulas: bytes, seconds and memory of each stage from the sizes of a run
- `calibration.py`: sizes and speeds of a finished run, which correct the formulas
"""
