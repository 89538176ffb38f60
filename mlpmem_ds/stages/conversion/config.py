"""The flags of `convert_checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mlpmem_ds.core.config import Flags, default_of, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.models.memory_config import DEFAULT_LAMBDA
from mlpmem_ds.stages import shared_flags


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Join memories with their base into a Hugging Face directory, and verify it by loading it again."""

    example: ClassVar[str] = (
        "python tools/convert_checkpoint.py --checkpoint run/memory --model run/base --report run/report"
        " --output run/export"
    )

    checkpoint: tuple[Path, ...] = option(
        "output directory of launch/train.py; where it has not finished, its newest whole checkpoint; several"
        " make a bank",
        (),
        by_url=True,
    )
    gate: Path | None = option(
        "output directory of launch/fit_gate.py, which weighs these memories", None, by_url=True
    )
    base_only_threshold: float | None = option(
        "leave a memory out where its weight is below this (default: never)", None, at_least=0, at_most=1
    )
    step: int | None = option(
        "with --checkpoint: the checkpoint of this step, also of a finished training", None, at_least=0
    )
    from_reference: str | None = option(
        "instead of --checkpoint: a memory that the method's authors published, a directory or Hub name;"
        " needs --model, its base",
        None,
        metavar="PATH",
        identity="resolved",
        by_url=True,
    )
    output: Path = option("directory to write")
    write: Literal["export", "memory"] = option(
        "a Hugging Face directory with base and memory; or, of a published memory or of a checkpoint, a"
        " directory as training leaves it",
        "export",
    )
    input_layer: shared_flags.Layer = shared_flags.layer(
        "with --from-reference: the layer whose MLP input the memory reads", identity="own"
    )
    model: str | None = option(
        "the base: a directory or Hub name (default: the one that the keys were extracted with)",
        None,
        identity="none",
        by_url=True,
    )
    lmbda: float | None = shared_flags.lmbda(f"the report's choice, else {DEFAULT_LAMBDA}")
    report: Path | None = option(
        "report of launch/evaluate.py: its λ, and its perplexities for the model card", None, by_url=True
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("of the stored weights", "float32")
    tokenizer: str | None = option(
        "directory or Hub name (default: the base's, else the corpus's)", None, identity="none", by_url=True
    )
    license: str | None = option(
        "for the model card: the export's licence, as the Hub names it, such as apache-2.0 (default: what"
        " the base's card says)",
        None,
    )
    language: tuple[str, ...] = option(
        "for the model card: languages, as ISO 639 codes (default: what the base's card says)", (), parse=str
    )
    corpus_license: str | None = option("for the model card: the corpus's licence, in words", None)
    max_shard_gigabytes: float = option("largest weights file, in GB", 5.0, above=0)
    attention: str = option(
        "attention implementation for the verification: sdpa, eager or flash_attention_2; auto = sdpa, and"
        " eager for a base without it",
        "auto",
    )

    def check(self) -> None:
        if bool(self.checkpoint) == (self.from_reference is not None):
            raise UserError(
                "give either --checkpoint, a training's output, or --from-reference, a published memory"
            )
        if self.from_reference is not None and self.model is None:
            raise UserError("--from-reference needs --model, the base that the memory was trained for")
        if self.from_reference is not None and self.report is not None:
            raise UserError(
                "--report does not go with --from-reference: import the memory with --write memory, evaluate"
                " it, and export that with --checkpoint and --report"
            )
        if self.step is not None and len(self.checkpoint) != 1:
            raise UserError(
                f"--step {self.step} names a checkpoint of one training: give one --checkpoint with it"
            )
        if self.write == "memory" and (len(self.checkpoint) > 1 or self.gate is not None):
            raise UserError("--write memory writes one memory: give one --checkpoint, and no --gate")
        if self.gate is not None and not self.checkpoint:
            raise UserError("--gate weighs trained memories: give them with --checkpoint")
        shared_flags.refuse_repeated(self.checkpoint, flag="--checkpoint")
        if self.checkpoint and self.input_layer != default_of(Config, "input_layer"):
            raise UserError(
                f"--input-layer {self.input_layer}: a trained memory knows its layer; the flag is for"
                " --from-reference: leave it out"
            )
        if self.write == "memory":
            # It is written in float32 and one file, without a base and a card, and nothing runs it.
            names = ("dtype", "lmbda", "base_only_threshold", "report", "license", "language")
            more = ("corpus_license", "max_shard_gigabytes", "attention")
            self.refuse_unused(*names, *more, of="--write export")
