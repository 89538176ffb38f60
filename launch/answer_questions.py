#!/usr/bin/env python3
"""Question sets answered by base, base + memory, controls and base + passages → one table."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the package of this checkout, from any directory and installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlpmem_ds.commands import answer_questions as main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
