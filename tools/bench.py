#!/usr/bin/env python3
"""Side-by-side measurements: python tools/bench.py NAME --output FILE.json; NAME --help shows the sizes."""

import importlib
import sys

from mlpmem_ds.core.front_end import run_front_end

NAMES = ("loss", "targets")


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\nNAME: {' '.join(NAMES)}\n")
        return 0
    if name not in NAMES:
        sys.stderr.write(f"error: no benchmark {name!r}: choose one of {' '.join(NAMES)}\n")
        return 2
    benchmark = importlib.import_module(f"benchmarks.{name}")
    return run_front_end(
        benchmark.Config,
        benchmark.run,
        argv=words[1:],
        description=benchmark.DESCRIPTION,
        example=f"python tools/bench.py {name} --output {name}.json",
    )


if __name__ == "__main__":
    sys.exit(main())
