"""Part of `fit_gate`: base, what is weighed against it, and texts, opened and checked before anything is
written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlpmem_ds.core.once import shared_place
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.stages.evaluation.arms import ensemble, memory
from mlpmem_ds.stages.evaluation.arms.arm import Arm
from mlpmem_ds.stages.evaluation.arms.base import Context, ModelArm, open_base
from mlpmem_ds.stages.evaluation.arms.memory import MemoryArm
from mlpmem_ds.stages.evaluation.arms.mixed import Member
from mlpmem_ds.stages.evaluation.arms.states import StatesArm
from mlpmem_ds.stages.evaluation.inputs import (
    find_layers_path,
    refuse_training_text,
    with_fetched_memories,
)
from mlpmem_ds.stages.evaluation.splits import Split, open_tuning_split
from mlpmem_ds.stages.gating.config import Config

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Text:
    """The tuning split of one corpus."""

    part: Literal["domain", "general"]
    root: Path
    split: Split


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that the fit reads."""

    base: ModelArm
    members: tuple[Member, ...]
    """what the gate weighs: memories, or a second language model"""
    states: StatesArm | None
    """for a gate that reads hidden states"""
    texts: Mapping[str, Text]
    """by the name of its stream"""

    @property
    def arms(self) -> tuple[Arm, ...]:
        return (self.base, *self.members, *(() if self.states is None else (self.states,)))

    @property
    def streams(self) -> dict[str, CorpusSplit]:
        return {name: text.split.corpus for name, text in self.texts.items()}


def open_inputs(config: Config, world: World) -> Inputs:
    """Open and check everything, models on this rank's device; nothing has been written yet.

    Raises:
        UserError: an input is missing, does not belong to this base, or has too little text.
    """
    scoring = with_fetched_memories(config.scoring())
    texts = _open_texts(config)
    splits = [text.split.corpus for text in texts.values()]
    shared = shared_place(config.output, world)
    base = open_base(
        scoring,
        splits,
        layers_path=find_layers_path(scoring),
        device=device_of_rank(config.device, world),
        shared=shared,
    )
    num_positions = sum(split.num_positions for split in splits)
    context = Context(base=base, texts=splits, num_positions=num_positions, shared=shared)
    memories = memory.open_memories(scoring, context)
    members: list[Member] = [*memories, *ensemble.open_arms(scoring, context)]
    refuse_training_text({name: text.split for name, text in texts.items()}, (base, *members))
    if not config.general:
        _logger.warning(
            "the gate is fitted to text of --corpus alone, and will cost other text several per cent: give"
            " some with --general"
        )
    states = _states_arm(config.kind, base, memories)
    return Inputs(base=base, members=tuple(members), states=states, texts=texts)


def _open_texts(config: Config) -> dict[str, Text]:
    """In the order of the flags; the stream's name says which one it is."""
    texts = {}
    roots: Sequence[tuple[Literal["domain", "general"], str]] = [
        *(("domain", root) for root in config.corpus),
        *(("general", root) for root in config.general),
    ]
    for number, (part, root) in enumerate(roots):
        flag = "--corpus" if part == "domain" else "--general"
        split = open_tuning_split(
            Path(root), config.tuning_split, flag=flag, min_positions=config.min_positions
        )
        texts[f"{part}{number}"] = Text(part=part, root=Path(root), split=split)
    return texts


def _states_arm(kind: str, base: ModelArm, memories: Sequence[MemoryArm]) -> StatesArm | None:
    if kind != "router":
        return None
    return StatesArm(
        name="states", forward_pass=base.forward_pass, price=base.price, memories=tuple(memories)
    )
