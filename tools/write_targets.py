#!/usr/bin/env python3
"""Search each key's neighbours and write them as next-token distributions."""

import sys

from mlpmem_ds.commands import write_targets as main

if __name__ == "__main__":
    sys.exit(main())
