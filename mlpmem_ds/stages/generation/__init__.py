"""`generate`: an exported model and prompts → text.

Read in this order:
    options         the flags that name a joint model; `run_lm_eval` has them too
    config          the flags
    prompts         the texts to continue, from the flags or a file
    exported_model  the joint model and its tokenizer, of an export or of its parts; for `run_lm_eval` too
    generate        `run`: prompts → continuations
    text            tokens → the text that is shown, in pieces or in two columns
"""
