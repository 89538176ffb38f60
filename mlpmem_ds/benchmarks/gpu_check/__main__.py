"""`python -m mlpmem_ds.benchmarks.gpu_check`."""

import sys

from mlpmem_ds.benchmarks.gpu_check.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
