"""`prepare_corpus`: text → token shards, dealt to the splits train, tuning, test and heldout.

Read in this order:
    config          the flags
    prepare_corpus  `run`: the stage from its inputs to its manifest
    survey          first reading of the inputs: names the units, hashes every document
    shared_survey   the same by several ranks, each its files
    splits          which documents are taken, and the split of each
    blend           inputs with weights: which of their documents are taken
    near_duplicates documents that nearly repeat others
    corpus_tokenizer    its tokenizer: loaded or trained, and kept
    tokenization    second reading: documents → token ids, batch by batch
    ledger          what was read and what was left out
    workers         the processes that both readings share
"""
