#!/usr/bin/env python3
"""Train a memory with DeepSpeed; start it with deepspeed, torchrun, mpirun, srun, or as it is."""

import sys

from mlpmem_ds.commands import train as main

if __name__ == "__main__":
    sys.exit(main())
