#!/usr/bin/env python3
"""A report as a page to look at, with text token by token: who was right, and what else was likely."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the package of this checkout, from any directory and installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlpmem_ds.commands import view_report as main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
