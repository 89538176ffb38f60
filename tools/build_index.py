#!/usr/bin/env python3
"""Build a sharded IVF-PQ index over a key directory."""

import sys

from mlpmem_ds.commands import build_index as main

if __name__ == "__main__":
    sys.exit(main())
