"""The flags of `fit_gate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.collectives.opening import Exchange
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.evaluation.config import Config as EvaluationConfig
from mlpmem_ds.stages.evaluation.config import memory_directories

SECOND = "second_model"
"""the name of the model of `--ensemble` in messages and in the gate's manifest"""


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """A gate: the memory's weight at each token, learned on tuning splits.

    Scores the tuning splits of all corpora with the base and the memories, and fits a small net to them that
    gives the weights of the mixture from what is known at a position. Each corpus counts the same. As a
    control, --ensemble weighs a second language model in the memory's place.
    """

    example: ClassVar[str] = (
        "python launch/fit_gate.py --model run/base --memory run/memory --corpus run/corpus"
        " --general run/general --output run/gate"
    )
    memory_flags: ClassVar[tuple[str, ...]] = ("--batch-windows",)

    model: str = option("base language model: a directory or Hub name", identity="none", by_url=True)
    memory: tuple[str, ...] = option(
        "trained memory: an output of launch/train.py, or an exported model or its Hub name; several make the"
        " gate of a bank, and get names of their own or of their directories",
        (),
        identity="none",
        metavar="[NAME=]DIR",
        by_url=True,
    )
    ensemble: str | None = option(
        "instead of a memory a second language model of the base's vocabulary, such as the base trained on:"
        " a control for evaluate, which takes the gate with the same --ensemble",
        None,
        identity="none",
        metavar="DIR",
        by_url=True,
    )
    corpus: tuple[str, ...] = option(
        "corpus directories of the memories' domains", identity="none", metavar="DIR", by_url=True
    )
    general: tuple[str, ...] = option(
        "corpus directories of other text, on which the base should stay as it is; without them the gate"
        " makes such text several per cent worse",
        (),
        identity="none",
        metavar="DIR",
        by_url=True,
    )
    output: Path = option("gate directory to write")
    kind: Literal["history", "confidences", "router"] = option(
        "what the gate reads: how sure both distributions are and how well each predicted the tokens before;"
        " confidences: the first alone; router: the first, and the hidden states of both",
        "history",
    )
    hidden: int | None = option("width of its hidden layer (default: 32, router 128)", None, at_least=1)
    tuning_split: str = option("split of each corpus that it is fitted to", "tuning")
    stopping_fraction: float = option(
        "share of each corpus's documents that chooses when to stop", 0.5, above=0, below=1
    )
    learning_rate: float = option("of AdamW", 3e-3, above=0)
    max_epochs: int = option("passes over the text at most", 200, at_least=0)
    patience: int = option("epochs without a better stopping loss after which it ends", 15, at_least=1)
    batch_positions: int = option("positions in a step", 4096, at_least=1)
    min_positions: int = option("of a tuning split; fewer are refused", 512, at_least=2)
    seed: int = option("of the first layer and the order of the batches", 0, at_least=0)
    unit_positions: int = option("positions in a unit of scoring", 8192, at_least=1)
    exchange: Exchange = shared_flags.exchange()
    rank_timeout_seconds: float = shared_flags.rank_timeout_seconds()
    batch_windows: int = option("windows that a GPU reads at once", 16, at_least=1, identity="none")
    dtype: shared_flags.Dtype = shared_flags.dtype("resolved")
    memory_weights: shared_flags.MemoryWeights = shared_flags.memory_weights()
    device: str = shared_flags.device()
    device_map: shared_flags.DeviceMap = shared_flags.device_map()
    attention: str = shared_flags.attention()

    def check(self) -> None:
        if bool(self.memory) == (self.ensemble is not None):
            raise UserError(
                "a gate weighs memories or a second language model: give either --memory or --ensemble"
            )
        if not self.corpus:
            raise UserError("a gate needs at least one --corpus")
        if self.ensemble is not None and self.kind == "router":
            raise UserError(
                "--kind router reads hidden states of memories, and --ensemble has none: choose another kind"
            )
        memory_directories(self.memory)
        both = [*self.corpus, *self.general]
        if len({Path(root).resolve() for root in both}) != len(both):
            raise UserError(
                f"--corpus and --general name a directory twice ({', '.join(both)}): give each once"
            )

    def scoring(self) -> EvaluationConfig:
        """The flags of an evaluation that opens the same models."""
        return EvaluationConfig(
            model=self.model,
            corpus=Path(self.corpus[0]),
            output=self.output,
            memory=self.memory,
            ensemble=() if self.ensemble is None else (f"{SECOND}={self.ensemble}",),
            batch_windows=self.batch_windows,
            dtype=self.dtype,
            memory_weights=self.memory_weights,
            device=self.device,
            device_map=self.device_map,
            attention=self.attention,
        )
