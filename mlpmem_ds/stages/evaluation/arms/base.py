"""The base: its pass over the text serves every arm that is mixed with it, and alone it is the arm `base`.

The other arms are opened after it, by a function for each kind (`Opener`). `ModelArm` is any language model's
own predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from mlpmem_ds.engines.hidden_states import TransformersSource, check_source_reads
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.stages.evaluation.arms.arm import Arm, Part, Price, Scores
from mlpmem_ds.stages.evaluation.arms.training_records import texts_of_training
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass, Scan
from mlpmem_ds.stages.shared_flags import device_map_of

BASE = "base"


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelArm(Arm):
    """A language model's own predictions."""

    name: str
    description: str
    part: Part
    path: str
    """as the user named it"""
    sha256: str
    inputs: Mapping[str, str]
    forward_pass: ForwardPass
    price: Price
    resolved: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained_on: tuple[tuple[str, str], ...] = ()
    stands_alone: bool = True

    @property
    def source(self) -> TransformersSource:
        return self.forward_pass.source

    def score(self, scan: Scan) -> Scores:
        return Scores(values=scan.log_probabilities_n, guesses=scan.guesses_n3)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every arm is opened with, besides the flags."""

    base: ModelArm
    texts: Sequence[CorpusSplit]
    """the splits that are scored"""
    num_positions: int
    """that will be scored"""
    shared: Path | None
    """where several ranks keep the fingerprints of models, each computed by one of them"""
    ranks_of_host: int = 1
    """that share its memory, as far as the launcher says"""

    @property
    def corpus(self) -> CorpusSplit:
        """One of the texts, for what is the same in all."""
        return self.texts[0]

    @property
    def corpora(self) -> Sequence[CorpusSplit]:
        """One of the texts of each corpus: a gate is fitted to several."""
        return list({text.root: text for text in self.texts}.values())


class Opener(Protocol):
    """Opens the arms of one kind that the flags name, and checks that they belong to the base and the text.

    Raises:
        UserError: with both names and the remedy.
    """

    def __call__(self, config: Config, context: Context) -> Sequence[Arm]: ...


def open_base(
    config: Config,
    texts: Sequence[CorpusSplit],
    *,
    layers_path: str | None,
    device: torch.device,
    shared: Path | None,
) -> ModelArm:
    """Open `--model`.

    Args:
        config: the flags.
        texts: the splits that are scored.
        layers_path: where its layers are, if extraction had to be told.
        device: of this rank.
        shared: where several ranks keep the fingerprint that one of them computes.

    Raises:
        UserError: there is no such model, or it is of another vocabulary than the corpus.
    """
    sha256 = fingerprint_model(config.model, shared=shared)
    source = TransformersSource(
        config.model,
        dtype=config.dtype,
        device=device,
        attention=config.attention,
        layers_path=layers_path,
        device_map=device_map_of(config.device_map),
    )
    check_source_reads(source, texts, config.model, shared=shared)
    return ModelArm(
        name=BASE,
        description="the frozen language model alone, to which the other arms are compared",
        part="base",
        path=config.model,
        sha256=sha256,
        inputs={"model": sha256},
        resolved={"dtype": source.dtype_name, "attention": source.attention},
        forward_pass=ForwardPass(source=source, name=None, batch_windows=config.batch_windows),
        price=Price(
            parameters=num_parameters(source),
            bytes=bytes_of_source(config.model, source),
            seconds=0.0,
            tokens=None,
        ),
        trained_on=texts_of_training(Path(config.model), "--model"),
    )


def num_parameters(source: TransformersSource) -> int:
    return sum(parameter.numel() for parameter in source.model.parameters())


def bytes_of_source(path: str, source: TransformersSource) -> int:
    """Of a model directory, or (a Hub name) of the weights as they are in memory."""
    if Path(path).is_dir():
        return bytes_of_model(Path(path))
    return sum(parameter.numel() * parameter.element_size() for parameter in source.model.parameters())


def bytes_of_model(root: Path) -> int:
    """Configuration and weights of a model directory."""
    files = [root / "config.json", *root.glob("*.safetensors"), *root.glob("*.bin")]
    return sum(path.stat().st_size for path in files if path.is_file())
