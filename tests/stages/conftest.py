"""A key directory with codes and values of the test's own choosing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import dynamic_module_utils

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.config import option
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import token_dtype
from mlpmem_ds.formats.keys import FORMAT, VERSION, unit_name


@dataclass(frozen=True, kw_only=True)
class _Config:
    output: Path = option("directory", identity="none")


def _make_keys(
    root: Path,
    vectors_ND: np.ndarray,
    values_N: np.ndarray,
    *,
    vocab_size: int = 50,
    block_size: int = 8,
    unit_positions: int = 96,
    scale: float = 0.5,
) -> Path:
    blocks = {unit_name(block.start): block for block in split_blocks(len(vectors_ND), unit_positions)}
    stage = open_stage(
        root,
        stage=FORMAT,
        version=VERSION,
        config=_Config(output=root),
        inputs={"corpus": "0" * 64},
        world=World(),
    )

    def write(unit: str, writer: UnitWriter) -> None:
        rows = slice(*blocks[unit])
        writer.array(f"keys-{unit}.npy", vectors_ND[rows])
        writer.array(f"values-{unit}.npy", values_N[rows].astype(token_dtype(vocab_size)))

    def describe() -> dict[str, Any]:
        codec = {
            "name": "int8" if vectors_ND.dtype == np.int8 else "raw",
            "dim": vectors_ND.shape[1],
            "scale": scale,
        }
        return {
            "codec": codec,
            "num_positions": len(vectors_ND),
            "unit_positions": unit_positions,
            "input_size": 0,
            "vocab_size": vocab_size,
            "split": "train",
            "block_size": block_size,
        }

    stage.run_units(list(blocks), write)
    stage.finish(list(blocks), describe)
    return root


@pytest.fixture(scope="session")
def make_keys() -> Callable[..., Path]:
    """make_keys(root, vectors [N, D] int8 or float16, values [N], …) writes a complete key directory."""
    return _make_keys


@pytest.fixture(scope="session")
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """transformers copies the code of what it loads into a cache: one of these tests' own, not the user's.

    One for the session: Python remembers the first place that the package of these modules was imported from.
    """
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("modules")
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(path))
        patch.setattr(sys, "path", list(sys.path))
        yield path


@pytest.fixture(scope="session")
def forked_training() -> Iterator[Callable[..., tuple[list[Any], list[str]]]]:
    """forked_training(step, …) runs steps of trainings, see forked_training.py; their results, and what each
    said."""
    here = Path(__file__).resolve()
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX", "MASTER"))
    }
    process = subprocess.Popen(
        [sys.executable, str(here.with_name("forked_training.py"))],
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[2]), "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(*steps: dict[str, Any]) -> tuple[list[Any], list[str]]:
        stdin.write(json.dumps(steps) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, "the process that forks trainings has ended; its stderr says why"
        results, said = json.loads(line)
        return results, said

    yield run
    stdin.close()
    process.wait(60)
