#!/usr/bin/env python3
"""Perplexity against parameters and compute, decoder alone and decoder + memory: exponents with intervals."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the package of this checkout, from any directory and installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlpmem_ds.commands import fit_scaling as main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
