"""The flags of `answer_questions`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.corpus import SpecialTokens
from mlpmem_ds.stages import shared_flags

_RESERVED_NAMES = ("base", "memory", "rag")


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Answer question sets in local files: base, base + memory, controls, and base + passages, in one table.

    Open questions are answered greedily (exact match, F1, contains), choices and last words by their
    log-probability (accuracy); each arm with its time to the first token and its tokens a second.
    """

    example: ClassVar[str] = (
        "python launch/answer_questions.py --model run/export --questions nq_open.jsonl piqa.jsonl"
        " --passages run/corpus --control base_trained_on=run/base_trained_on --output run/answers"
    )

    model: str = option(
        "an exported model (arms base and base+memory), or a plain language model (arm base)",
        identity="none",
        by_url=True,
    )
    questions: tuple[Path, ...] = option(
        "files of JSON lines: docs/questions.md has their layouts", identity="none"
    )
    output: Path = option("directory to write")
    lambdas: tuple[str, ...] = shared_flags.lambdas("of base+memory (default: the export's own gate)", ())
    control: tuple[str, ...] = option(
        "further arms: NAME=a plain language model", (), identity="none", metavar="NAME=DIR", by_url=True
    )
    passages: Path | None = option(
        "corpus: adds the arm base+rag, which reads passages of its train split (BM25) before a question",
        None,
        by_url=True,
    )
    passage_tokens: int = shared_flags.passage_tokens()
    num_passages: int = shared_flags.num_passages()
    num_fewshot: int = option("answered examples before an open question, of its own set", 0, at_least=0)
    limit: int | None = option(
        "at most this many questions of each file, its first ones (default: all)", None, at_least=1
    )
    max_new_tokens: int = option("largest number of tokens of an answer", 32, at_least=1)
    special_tokens: SpecialTokens = shared_flags.special_tokens()
    batch: int = option(
        "questions (of choices: choices) that go through the model at once; times are those of a batch",
        1,
        at_least=1,
    )
    unit_questions: int = option("questions in a unit of work", 64, at_least=1)
    bootstrap_samples: int = shared_flags.bootstrap_samples()
    dtype: shared_flags.Dtype = shared_flags.dtype("resolved")
    device: str = shared_flags.device()

    def check(self) -> None:
        if self.lambdas:
            shared_flags.grid_of(self.lambdas)
        if not self.questions:
            raise UserError("nothing to ask: give --questions FILE…")
        names = [set_name(path) for path in self.questions]
        if "" in names:
            raise UserError(
                f"--questions {self.questions[names.index('')]}: a set is called by its file's name up to the"
                " first dot, and this one begins with it: rename it"
            )
        if len(set(names)) < len(names):
            raise UserError(f"two of --questions have the same name ({', '.join(names)}): rename one")
        control_models(self.control)
        if self.passages is None:
            self.refuse_unused("passage_tokens", "num_passages", of="--passages")


def set_name(path: Path) -> str:
    """What a file of questions is called in the table: its name to the first dot."""
    return re.sub(r"\W", "_", path.name.partition(".")[0])


def control_models(controls: tuple[str, ...]) -> dict[str, str]:
    """NAME=DIR words → name of the arm and model.

    Raises:
        UserError: not of that form, or a name that is taken.
    """
    models: dict[str, str] = {}
    for word in controls:
        name, sign, place = word.partition("=")
        if not sign or not place or not re.fullmatch(r"\w+", name):
            raise UserError(f"--control {word}: give NAME=DIR with a name of letters, digits and underscores")
        if name in models or name in _RESERVED_NAMES:
            raise UserError(f"--control {word}: the name {name} is taken; choose another")
        models[name] = place
    return models
