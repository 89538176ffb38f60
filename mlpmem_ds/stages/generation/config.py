"""The flags of `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mlpmem_ds.core.config import flag_name, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.output_files import check_output_file
from mlpmem_ds.formats.corpus import SpecialTokens
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.generation.options import JointOptions

_SMALLEST, _LARGEST = 1e-3, 1e3
"""factors of a score"""


@dataclass(frozen=True, kw_only=True)
class Config(JointOptions):
    """Continue prompts with an export, or a base and its memories; greedy unless --temperature is given."""

    example: ClassVar[str] = (
        'python launch/generate.py --model run/export --prompt "def read(self, " --max-new-tokens 40'
        " --compare"
    )
    memory_flags: ClassVar[tuple[str, ...]] = ("--batch-size", "--max-new-tokens")

    prompt: tuple[str, ...] = option("texts to continue", (), parse=str)
    prompts_file: Path | None = option(
        "instead: a UTF-8 file with one prompt a line; of JSON lines (.jsonl), each is a text, or an object"
        " with one in `prompt`, with --chat also one with a conversation in `messages`",
        None,
    )
    chat: bool = option(
        "each prompt is a user's message: the tokenizer's chat template renders it, and the model answers",
        False,
    )
    system: str | None = option("with --chat: system message before each prompt", None, parse=str)
    chat_template: Path | None = option(
        "with --chat: a file with a template of Jinja (default: the tokenizer's own)", None
    )
    special_tokens: SpecialTokens = shared_flags.special_tokens()
    max_new_tokens: int = option("largest number of tokens to add", 64, at_least=1)
    temperature: float = option(
        "of the mixture's distribution; 0 = always the likeliest token", 0.0, at_least=0
    )
    top_p: float = option(
        "sample from the likeliest tokens that hold this probability together", 1.0, above=0, at_most=1
    )
    num_beams: int = option("beams; 1 = none", 1, at_least=1)
    no_repeat_ngram_size: int = option(
        "no run of this many tokens occurs twice in prompt and text; 0 = no limit", 0, at_least=0
    )
    repetition_penalty: float = option(
        "penalty for tokens that have occurred already; above 1 makes them rarer", 1.0, above=0
    )
    seed: int = option("seed of the sampling", 0, at_least=0)
    lmbda: float | None = shared_flags.lmbda("the export's or the gate's, else 0.25")
    compare: bool = option("show the base alone (λ = 0) next to base + memory", False)
    stream: bool = option("write the text as it is made; for one prompt, without --compare and beams", False)
    html: Path | None = option(
        "HTML file to write too: prompts and new text, token by token, with what base and memory gave each",
        None,
    )
    batch_size: int = option("prompts that are continued at once", 16, at_least=1)
    dtype: shared_flags.Dtype = shared_flags.dtype("none")
    memory_weights: shared_flags.MemoryWeights = option(
        "the memory's matrices: as they are, or rounded to int8 (on a CPU a faster step; see"
        " docs/generation.md)",
        "float",
    )
    base_weights: Literal["float", "8bit", "4bit"] = option(
        "the base's matrices: as they are, or rounded to 8 or 4 bits by bitsandbytes while they are read",
        "float",
    )
    device: str = shared_flags.device()
    device_map: shared_flags.DeviceMap = shared_flags.device_map()

    def check(self) -> None:
        super().check()
        if self.gate is not None and self.lmbda is not None:
            raise UserError("--gate finds the weight at each token: leave out --lambda")
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if value and not _SMALLEST <= value <= _LARGEST:
                raise UserError(
                    f"{flag_name(name)} {value:g} makes scores that no float32 holds: give one from"
                    f" {_SMALLEST:g} to {_LARGEST:g}"
                )
        if bool(self.prompt) == (self.prompts_file is not None):
            raise UserError("give either --prompt or --prompts-file")
        if not self.chat:
            self.refuse_unused("system", "chat_template", of="--chat")
        if self.stream and (self.compare or self.num_beams > 1):
            raise UserError("--stream writes one text as it is made: leave out --compare and --num-beams")
        if self.html is not None:
            read = [path for path in (self.prompts_file, self.chat_template) if path is not None]
            check_output_file(self.html, flag="--html", example="generated.html", inputs=read)
        if self.memory_weights == "int8" and self.device_map != "none":
            # accelerate brings inputs and weights together by hooks on the float layers, which would be gone.
            raise UserError(
                f"--memory-weights int8 cannot be rounded where --device-map {self.device_map} has put the"
                " memory's matrices: leave one of the two out (evaluate takes both)"
            )
