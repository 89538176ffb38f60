#!/usr/bin/env python3
"""Continue prompts with an exported model, with the memory, without it, or both side by side."""

import sys

from mlpmem_ds.commands import generate as main

if __name__ == "__main__":
    sys.exit(main())
