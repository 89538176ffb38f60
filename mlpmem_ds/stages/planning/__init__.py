"""`plan`: what a run will need before it starts: bytes, time, memory and GPU hours of every stage.

Read in this order:
- `config.py`: the flags
- `plan.py`: `run`: flags, model and machine → sizes → costs and warnings; `table.py`: as a table
- `sizes.py`: the sizes, from flags, model and finished run; `plan_warnings.py`: what will not fit
- `workload.py`: the sizes of a run, and the machine
- `counts.py`: operations, bytes moved and files of each stage, counted; `sizes_on_disk.py`: bytes it leaves
- `cost_model.py`: seconds of each stage from its counts; `rank_memory.py`: memory of a rank
- `limits.py`: what it gives no time for; `words.py`: how numbers are written
- `calibration.py`: sizes and speeds of a finished run, which correct the formulas
"""
