#!/usr/bin/env python3
"""Published Arrow datastores and targets → a corpus, keys and targets, ready to train."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.exchange import import_datastore
from mlpmem_ds.stages.exchange.config import ImportConfig


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        ImportConfig,
        import_datastore.run,
        argv=argv,
        description=(
            "Convert the Arrow files of the method's public code: datastores (keys, vals) and targets. Needs"
            " pyarrow."
        ),
        example=(
            "python tools/import_datastore.py --datastore dstore.arrow --targets knn.arrow --model BASE"
            " --output run"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
