"""`bench NAME`: run one of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from mlpmem_ds.core.front_end import run_front_end, seldom_collected

NAMES = (
    "corpus",
    "decode",
    "evaluate",
    "extract",
    "goodput",
    "index",
    "loss",
    "plan",
    "quality",
    "scale",
    "sweep",
    "targets",
    "train",
)
_FOLDERS = ("quality", "scale", "sweep")


def module_of(name: str) -> str:
    """The module with the `Config` and the `run` of a benchmark; that of a folder has the folder's name."""
    return f"mlpmem_ds.benchmarks.{name}.{name}" if name in _FOLDERS else f"mlpmem_ds.benchmarks.{name}"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the benchmark that the first word names; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    prog = Path(sys.argv[0]).name if prog is None else prog
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Side-by-side measurements on this machine, written as JSON. `NAME --help` shows the"
        " sizes, and how long the default ones take.",
        epilog="example: python tools/bench.py loss --output loss.json",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=f"what to measure: {', '.join(NAMES)}")
    name = parser.parse_args(words[:1]).name
    with seldom_collected():
        benchmark = importlib.import_module(module_of(name))
    return run_front_end(benchmark.Config, benchmark.run, argv=words[1:], prog=f"{prog} {name}")
