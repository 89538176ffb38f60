#!/usr/bin/env python3
"""Files of every kind that is read, damaged at random: nothing may be lost in silence, hang or crash."""

import sys

from mlpmem_ds.commands import fuzz_readers as main

if __name__ == "__main__":
    sys.exit(main())
