#!/usr/bin/env python3
"""Side-by-side measurements on this machine, written as JSON."""

import sys

from mlpmem_ds.commands import bench as main

if __name__ == "__main__":
    sys.exit(main())
