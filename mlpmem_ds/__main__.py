"""`python -m mlpmem_ds COMMAND …`; see commands.py."""

import sys

from mlpmem_ds.commands import main

if __name__ == "__main__":
    sys.exit(main())
