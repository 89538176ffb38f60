"""`inspect_run`: is a run directory whole?

Read in this order:
    config       the flags
    inspect_run  `run`: a line for each stage, checkpoint and export, then what is wrong
    contents     reads each of them and compares its files with its records
"""
