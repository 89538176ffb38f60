#!/usr/bin/env python3
"""Text → corpus: tokenized, split, memory-mapped."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.corpus import prepare_corpus


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        prepare_corpus.Config,
        prepare_corpus.run,
        argv=argv,
        description=(
            "Tokenize text, Markdown, source code, JSON lines, Parquet, webdataset tars or data sets of"
            " `datasets` into a corpus with train, tuning and test splits."
        ),
        example=(
            "python tools/prepare_corpus.py --input books/ --tokenizer train:4096 --output run/corpus "
            "--tuning-fraction .05 --test-fraction .05"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
