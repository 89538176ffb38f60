"""Bases of random weights for the GPU check, and how its steps call front-ends."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlpmem_ds import commands
from mlpmem_ds.benchmarks.gpu_check.sizes import BaseShape
from mlpmem_ds.benchmarks.made_up_corpus import write_made_up_corpus

_logger = logging.getLogger(__name__)


def write_base(shape: BaseShape, path: Path) -> Path:
    """A Llama of this shape, made from its configuration, in bfloat16; `path`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return path


def write_corpus(shape: BaseShape, positions: int, path: Path) -> Path:
    """Random tokens for this base; `path`."""
    return write_made_up_corpus(
        path, positions=positions, vocab_size=shape.vocab_size, block_size=shape.context
    )


def fresh(path: Path) -> Path:
    """The path with nothing at it, for a step that is done again in the same working directory."""
    if path.is_dir():
        shutil.rmtree(path)
    return path


def front_end(name: str, *words: object) -> None:
    """A command in this process.

    Raises:
        RuntimeError: it did not end with 0.
    """
    argv = [str(word) for word in words]
    _logger.info("mlpmem-%s %s", name, " ".join(argv))
    code = getattr(commands, name.replace("-", "_"))(argv, prog=name)
    if code != 0:
        raise RuntimeError(f"{name} {' '.join(argv)} ended with {code}")


def probed_front_end(
    reports: Path, name: str, *words: object, ranks: int | None = None, max_steps: int = 0
) -> list[dict[str, Any]]:
    """A command in processes of their own; what each rank said of its GPUs (probes.py), rank 0 first.

    Args:
        reports: an empty or new directory.
        ranks: processes started by torchrun; None = one process without a launcher.
        max_steps: of a training, which ends there and saves nothing; 0 = it runs to its end.

    Raises:
        CalledProcessError: a rank failed.
    """
    launcher: Sequence[str] = ()
    if ranks is not None:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    probe = ("-m", "mlpmem_ds.benchmarks.gpu_check.probes", str(reports), str(max_steps))
    command = [sys.executable, *launcher, *probe, name, *map(str, words)]
    _logger.info("%s", " ".join(command))
    fresh(reports).mkdir(parents=True)
    subprocess.run(command, check=True)
    return [
        json.loads((reports / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks or 1)
    ]
