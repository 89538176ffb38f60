#!/usr/bin/env python3
"""Corpus and base → what a memory is compared with: the base trained on, LoRA, or a bigger model."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the package of this checkout, from any directory and installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlpmem_ds.commands import train_baseline as main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
