#!/usr/bin/env python3
"""Corpus → keys: the frozen base's hidden states, compact, on any number of ranks."""

import sys

from mlpmem_ds.commands import extract_keys as main

if __name__ == "__main__":
    sys.exit(main())
