#!/usr/bin/env python3
"""A gate: the weight of each memory at each token, learned on tuning splits."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the package of this checkout, from any directory and installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlpmem_ds.commands import fit_gate as main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
