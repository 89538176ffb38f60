#!/usr/bin/env python3
"""Directories of a run to an object store and back, behind a running stage, verified."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the package of this checkout, from any directory and installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlpmem_ds.commands import mirror as main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
