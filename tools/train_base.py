#!/usr/bin/env python3
"""Corpus → a small base trained from scratch, or an existing base trained on."""

import sys

from mlpmem_ds.commands import train_base as main

if __name__ == "__main__":
    sys.exit(main())
