#!/usr/bin/env python3
"""Published Arrow datastores and targets → a corpus, keys and targets, ready to train."""

import sys

from mlpmem_ds.commands import import_datastore as main

if __name__ == "__main__":
    sys.exit(main())
