#!/usr/bin/env python3
"""Side-by-side measurements on this machine, written as JSON."""

import argparse
import importlib
import sys

from mlpmem_ds.core.front_end import run_front_end

NAMES = ("corpus", "decode", "evaluate", "extract", "index", "loss", "plan", "targets", "train")


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=f"{__doc__} `NAME --help` shows the sizes, and how long the default ones take.",
        epilog="example: python tools/bench.py loss --output loss.json",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=f"what to measure: {', '.join(NAMES)}")
    benchmark = importlib.import_module(f"benchmarks.{parser.parse_args(words[:1]).name}")
    return run_front_end(
        benchmark.Config,
        benchmark.run,
        argv=words[1:],
        command=words[0],
        description=benchmark.DESCRIPTION,
        example=f"python tools/bench.py {words[0]} --output {words[0]}.json",
    )


if __name__ == "__main__":
    sys.exit(main())
