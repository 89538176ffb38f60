#!/usr/bin/env python3
"""Keys and targets → the Arrow files of the method's public code."""

import sys

from mlpmem_ds.commands import export_datastore as main

if __name__ == "__main__":
    sys.exit(main())
