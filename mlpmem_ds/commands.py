"""The front-ends as commands: `mlpmem-train …` where the package is installed, `python -m mlpmem_ds train …`
anywhere.

Both run the very files of tools/ and launch/: next to the package in a checkout, inside it where a wheel was
installed. With a launcher: `torchrun --nproc-per-node 2 -m mlpmem_ds extract-keys …`, `deepspeed --module
mlpmem_ds train …`.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import mlpmem_ds

_PACKAGE = Path(__file__).parent
_PREFIX = "mlpmem-"


def folder(name: str) -> Path:
    """`tools`, `launch` or `ds_configs`: inside an installed package, or next to the package of a
    checkout."""
    return next(root / name for root in (_PACKAGE, _PACKAGE.parent) if (root / name).is_dir())


def front_ends() -> dict[str, Path]:
    """Command name → the file that it runs, sorted by name."""
    paths = [path for place in ("tools", "launch") for path in folder(place).glob("[!_]*.py")]
    return {path.stem.replace("_", "-"): path for path in sorted(paths, key=lambda path: path.stem)}


def run_command(name: str, words: Sequence[str]) -> int:
    """Run a front-end with these words as its command line; its exit code."""
    path = front_ends()[name]
    spec = importlib.util.spec_from_file_location(f"mlpmem_ds_front_end_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.argv = [_PREFIX + name, *words]  # the messages' and the usage line's name
    sys.path.insert(0, str(path.parent))  # as Python does for a script: bench.py reads its neighbours
    spec.loader.exec_module(module)
    return int(module.main())


def main(argv: Sequence[str] | None = None) -> int:
    """A console command by its own name, or `python -m mlpmem_ds NAME …`; the exit code."""
    called, *words = sys.argv if argv is None else ["", *argv]
    if words and words[0].startswith("--local_rank="):  # deepspeed --module puts it before the command's name
        words = [*words[1:], words[0]]
    name = Path(called).stem.removeprefix(_PREFIX).replace("_", "-")
    if name in front_ends():
        return run_command(name, words)
    if words and words[0].replace("_", "-") in front_ends():
        return run_command(words[0].replace("_", "-"), words[1:])
    answers = {"--version": f"mlpmem-ds {mlpmem_ds.__version__}", "--ds-configs": str(folder("ds_configs"))}
    if len(words) == 1 and words[0] in {*answers, "--help", "-h"}:
        sys.stdout.write(answers.get(words[0], _usage()) + "\n")
        return 0
    mistake = f"error: there is no command {words[0]!r}\n" if words else ""
    sys.stderr.write(f"{mistake}{_usage()}\n")
    return 2


def _usage() -> str:
    lines = [
        (
            "usage: python -m mlpmem_ds COMMAND … (also installed as mlpmem-COMMAND; COMMAND --help shows its"
            " flags)"
        ),
        "       python -m mlpmem_ds --version",
        (
            "       python -m mlpmem_ds --ds-configs      the directory of DeepSpeed configurations that come"
            " with it"
        ),
        "",
        "commands:",
    ]
    for name, path in front_ends().items():
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
        lines.append(f"  {name:20s} {summary[0] if summary else ''}".rstrip())
    return "\n".join(lines)
