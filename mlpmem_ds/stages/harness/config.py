"""The flags of `run_lm_eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.output_files import check_output_file
from mlpmem_ds.formats.corpus import SpecialTokens
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.generation.options import JointOptions
from mlpmem_ds.stages.questions.config import control_models

Suite = Literal["paper", "at-scale", "nine"]


@dataclass(frozen=True, kw_only=True)
class Config(JointOptions):
    """Ask an exported model questions through the lm-evaluation-harness, without and with its memory.

    Exact match on questions and accuracy on ranked choices, of the base (λ = 0) and with the memory. With
    --suite the tasks of the papers: λ chosen on one half of each and reported on the other, in one table
    (docs/suites.md).
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
    suite: tuple[Suite, ...] = option("tasks that papers report; --output is then a directory", ())
    data: Path | None = option(
        "with --suite: directory with local files NAME.jsonl; tasks without one are named and left out"
        " (default: all data from the Hub)",
        None,
        identity="none",
    )
    lambdas: tuple[str, ...] = shared_flags.lambdas(
        "to compare (default: 0 and the export's own; with --suite 0:1:0.05)", ()
    )
    generation_lambdas: tuple[str, ...] = shared_flags.lambdas(
        "to generate answers with, for --suite (default: --lambdas, else 0:1:0.25)", ()
    )
    passages: Path | None = option(
        "with --suite: corpus; adds the arm base+rag, which reads passages of its train split (BM25)"
        " before an open question",
        None,
        by_url=True,
    )
    passage_tokens: int = shared_flags.passage_tokens()
    num_passages: int = shared_flags.num_passages()
    control: tuple[str, ...] = option(
        "with --suite: further arms, NAME=a plain language model",
        (),
        identity="none",
        metavar="NAME=DIR",
        by_url=True,
    )
    max_new_tokens: int | None = option(
        "with --suite: largest number of tokens of an answer (default: the task's own)", None, at_least=1
    )
    bootstrap_samples: int = shared_flags.bootstrap_samples(condition="with --suite: ")
    num_fewshot: int | None = option(
        "examples before each question (default: the task's own; local files: 0)", None, at_least=0
    )
    limit: int | None = option(
        "largest number of documents of each task: its first, with --suite drawn by a hash (default: all)",
        None,
        at_least=1,
    )
    special_tokens: SpecialTokens = shared_flags.special_tokens()
    batch_size: int = option("prompts at once", 8, at_least=1)
    output: Path | None = option(
        "JSON file to write; one that exists is not replaced. With --suite: directory", None
    )
    dtype: shared_flags.Dtype = shared_flags.dtype("resolved")
    device: str = shared_flags.device()
    device_map: shared_flags.DeviceMap = shared_flags.device_map()

    def check(self) -> None:
        super().check()
        if self.passages is None:
            self.refuse_unused("passage_tokens", "num_passages", of="--passages")
        if self.suite:
            self._check_suite()
            return
        names = ("data", "generation_lambdas", "passages", "control", "max_new_tokens", "bootstrap_samples")
        self.refuse_unused(*names, of="--suite")
        if self.lambdas:
            shared_flags.grid_of(self.lambdas)
        if not (self.questions or self.ranking or self.tasks):
            raise UserError("nothing to ask: give --suite, --questions, --ranking or --tasks")
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(
                f"--include-path {self.include_path} is not a directory: give one with task YAML files"
            )
        if self.output is not None and self.output.exists():
            raise UserError(f"--output {self.output} exists already: choose another name, or remove it")
        if self.output is not None:
            check_output_file(self.output, example="scores.json")

    def _check_suite(self) -> None:
        if given := self.given("questions", "ranking", "tasks", "include_path", "num_fewshot"):
            raise UserError(f"{given[0]} does not go with --suite: run the command once for each")
        if self.output is None:
            raise UserError("--suite writes a directory: give --output DIR")
        if self.data is not None and not self.data.is_dir():
            raise UserError(
                f"--data {self.data} is not a directory: give one with files NAME.jsonl (docs/suites.md), or"
                " leave it out for the Hub"
            )
        for words, flag in ((self.lambdas, "--lambdas"), (self.generation_lambdas, "--generation-lambdas")):
            if words:
                shared_flags.grid_of(("0", "1", *words), flag=flag)  # these two are always scored
        if taken := {"joint", "memory_alone"} & set(control_models(self.control)):
            raise UserError(f"--control {taken.pop()}=…: the name is taken; choose another")
