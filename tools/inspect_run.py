#!/usr/bin/env python3
"""What is in a run directory, whether it is complete, and whether every checksum holds."""

import sys

from mlpmem_ds.commands import inspect_run as main

if __name__ == "__main__":
    sys.exit(main())
