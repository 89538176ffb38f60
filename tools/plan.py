#!/usr/bin/env python3
"""What a run will need: bytes, hours, GPUs and memory, stage by stage."""

import sys

from mlpmem_ds.commands import plan as main

if __name__ == "__main__":
    sys.exit(main())
