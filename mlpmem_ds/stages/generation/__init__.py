"""`generate`: an exported model and prompts → text.

Read in this order:
    config    the flags
    generate  `run`: prompts → continuations; `load_model` and `read_export` serve `run_lm_eval` too
"""
