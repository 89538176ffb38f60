"""`fuzz_readers`: no damaged file is read in silence, and none ends in a traceback, a hang or a crash.

Read in this order:
    config        the flags
    fuzz_readers  the command
    trials        one input after the other, and how it is judged; the report
    target        what is fuzzed: how a sample is written, read by us, and read independently
    texts         texts made of what readers stumble over
    mutations     how bytes are damaged
    bounded       inputs are tried in a child process, with limits of time and memory
    documents     samples of text files and JSON lines
    compression   gzip, zstd, bzip2, xz
    csvs          CSV and TSV
    archives      samples of members; tars, zips: the archives that hold them
    tables        Parquet, Arrow, saved data sets
    own_files     stage directories, checkpoints, evaluations
    user_files    configurations of models and of DeepSpeed, tokenizers, prompts, questions
"""
