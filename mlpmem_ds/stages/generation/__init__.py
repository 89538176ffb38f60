"""`generate`: an exported model and prompts → text.

Read in this order:
    config          the flags
    prompts         the texts to continue, from the flags or a file
    exported_model  the export's configuration, tokenizer and joint model; `run_lm_eval` loads it here too
    generate        `run`: prompts → continuations
    text            tokens → the text that is shown, in pieces or in two columns
"""
