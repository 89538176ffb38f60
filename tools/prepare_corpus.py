#!/usr/bin/env python3
"""Text → corpus: tokenized, split, memory-mapped."""

import sys

from mlpmem_ds.commands import prepare_corpus as main

if __name__ == "__main__":
    sys.exit(main())
