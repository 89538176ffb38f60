#!/usr/bin/env python3
"""Ask an exported model questions through the lm-evaluation-harness, without and with its memory."""

import sys

from mlpmem_ds.commands import run_lm_eval as main

if __name__ == "__main__":
    sys.exit(main())
