"""The flags of `run_lm_eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.corpus import SpecialTokens
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.generation.options import JointOptions


@dataclass(frozen=True, kw_only=True)
class Config(JointOptions):
    """Ask an exported model questions through the lm-evaluation-harness, without and with its memory.

    Exact match on questions and accuracy on ranked choices, of the base (λ = 0) and with the memory.
    """

    example: ClassVar[str] = (
        "python tools/run_lm_eval.py --model run/export --questions nq_open.jsonl --lambdas 0 0.5"
        " --limit 1000"
    )
    memory_flags: ClassVar[tuple[str, ...]] = ("--batch-size",)

    questions: Path | None = option(
        'JSON lines of {"question", "answer": text or list of texts}: exact match, asked as NQ-open is', None
    )
    ranking: Path | None = option(
        'JSON lines of {"query", "choices": [texts], "gold": index}: accuracy of the likeliest choice', None
    )
    tasks: tuple[str, ...] = option("tasks of the harness by name (most fetch their data from the Hub)", ())
    include_path: Path | None = option("directory with further task YAML files", None)
    lambdas: tuple[str, ...] = shared_flags.lambdas("to compare (default: 0 and the export's own)", ())
    num_fewshot: int | None = option(
        "examples before each question (default: the task's own; local files: 0)", None, at_least=0
    )
    limit: int | None = option("largest number of documents of each task (default: all)", None, at_least=1)
    special_tokens: SpecialTokens = shared_flags.special_tokens()
    batch_size: int = option("prompts at once", 8, at_least=1)
    output: Path | None = option("JSON file to write; one that exists is not replaced", None)
    dtype: shared_flags.Dtype = shared_flags.dtype("none")
    device: str = shared_flags.device()
    device_map: shared_flags.DeviceMap = shared_flags.device_map()

    def check(self) -> None:
        super().check()
        if self.lambdas:
            shared_flags.grid_of(self.lambdas)
        if not (self.questions or self.ranking or self.tasks):
            raise UserError("nothing to ask: give --questions, --ranking or --tasks")
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(
                f"--include-path {self.include_path} is not a directory: give one with task YAML files"
            )
        if self.output is not None and self.output.exists():
            raise UserError(f"--output {self.output} exists already: choose another name, or remove it")
        if self.output is not None and not self.output.parent.is_dir():
            raise UserError(f"--output {self.output}: {self.output.parent} does not exist; make it first")
