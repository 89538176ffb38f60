"""What a start imports: seconds of each start, and after a kill again. Counted in sys.modules of a fresh
process, never timed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = {"torch._dynamo", "torch._inductor"}
MODELS = {"transformers", "accelerate", "tokenizers"}
OTHERS = {"faiss", "webdataset", "matplotlib", "datasets", "pyarrow", "tensorboard", "peft", "lm_eval"}
FRONT_ENDS = """
import importlib
from mlpmem_ds.commands import COMMANDS, Command
for command in COMMANDS.values():
    if isinstance(command, Command):
        importlib.import_module("mlpmem_ds.stages." + command.config.partition(":")[0])
"""
TRAIN = """
import mlpmem_ds.stages.training.train
from mlpmem_ds.engines.deepspeed.library import import_deepspeed
import_deepspeed()
"""


def imported(code: str, libraries: set[str]) -> set[str]:
    """Those of the libraries that are loaded when a process has run the code."""
    code = f"{code}\nimport sys\nprint(*(name for name in {sorted(libraries)!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        # `--help` and the refusal of a flag need the flags alone.
        (FRONT_ENDS, {"torch", "deepspeed"} | MODELS | OTHERS | COMPILER),
        (
            "import mlpmem_ds.stages.targets.write_targets",
            {"deepspeed"} | MODELS | COMPILER | OTHERS - {"faiss"},
        ),
        # A base is loaded by a training that validates, or computes its inputs.
        (TRAIN, {"transformers", "accelerate"} | OTHERS | COMPILER),
    ],
    ids=["front-ends", "write_targets", "train"],
)
def test_a_start_imports_nothing_in_vain(code: str, unwanted: set[str]) -> None:
    assert imported(code, unwanted) == set()


def test_what_is_imported_is_seen() -> None:
    assert imported("import json", {"json", "torch"}) == {"json"}
