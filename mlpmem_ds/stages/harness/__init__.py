"""`run_lm_eval`: question answering and ranking with an exported model, at several λ.

Read in this order:
    config       the flags
    local_tasks  questions and rankings in one's own files → tasks of the harness, checked by line
    run_lm_eval  `run`: tasks → a table; engines/lm_eval.py calls the harness
"""
