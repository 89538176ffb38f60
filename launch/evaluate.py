#!/usr/bin/env python3
"""Base, retriever, memory and controls on unseen text → one table."""

import sys

from mlpmem_ds.commands import evaluate as main

if __name__ == "__main__":
    sys.exit(main())
