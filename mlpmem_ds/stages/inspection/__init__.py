"""`inspect_run`: is a run directory whole, how far is it, and what must go where a unit is broken?

Read in this order:
    config       the flags
    inspect_run  `run`: a line for each stage, checkpoint and export, then what is wrong
    contents     reads each of them and compares its files with its records
    watch        `--watch`, `--prometheus`: the rounds
    tail         what was added to a log since the last look
    progress     how far a stage is, from its ranks' events
    screen       a run on one screen, or as lines
    prometheus   the same for a collector of figures
    discard      `--discard`: a unit and what was made from it
    origins      what was made from what
"""
