#!/usr/bin/env python3
"""Keys and targets → the Arrow files of the method's public code."""

import sys

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.stages.exchange import export_datastore
from mlpmem_ds.stages.exchange.config import ExportConfig


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        ExportConfig,
        export_datastore.run,
        argv=argv,
        description=(
            "Write datastore.arrow (keys, vals) and targets.arrow (id_cnt, token_id, prob, label). Needs"
            " pyarrow."
        ),
        example="python tools/export_datastore.py --keys run/keys --targets run/targets --output run/arrow",
    )


if __name__ == "__main__":
    sys.exit(main())
