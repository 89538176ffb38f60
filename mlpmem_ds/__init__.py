"""MLP memory on DeepSpeed: give a language model a memory that was pretrained to imitate a retriever."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"error: mlpmem-ds needs Python 3.10 or newer, and this is {sys.version.split()[0]}")

__version__ = "0.1.0"
