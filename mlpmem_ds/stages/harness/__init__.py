"""`run_lm_eval`: question answering and ranking with an exported model, at several λ.

Read in this order:
    config       the flags
    local_tasks  questions and rankings in one's own files → tasks of the harness, checked by line
    run_lm_eval  `run`: tasks → a table; engines/lm_eval.py calls the harness

The tasks that papers report, `--suite`:
    tasks/*.yaml   each task: its prompt, choices, metrics, and its data set on the Hub
    suites         which tasks a suite has, their local files, and what is left out
    hub_records    data sets of the Hub → the fields that the tasks read
    task_scores    scores that the harness has not, and what guessing would score
    halves         which documents are asked; on which half λ is chosen, which is reported
    lengths        whether answers and choices fit into what a model reads
    grid_scores    a context and its continuations → log-probabilities at every λ, from one forward pass
    readers        who answers: base and memory, the base with passages, controls
    run_suite      the stage: a unit is a task and a reader
    suite_results  scores of every document → λ of each task, means, paired intervals
    suite_page     the table
"""
