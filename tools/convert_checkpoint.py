#!/usr/bin/env python3
"""A trained memory and its base → a Hugging Face directory."""

import sys

from mlpmem_ds.commands import convert_checkpoint as main

if __name__ == "__main__":
    sys.exit(main())
