"""Part of `evaluate`: the text and the arms, opened and checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.once import shared_place
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.model_files import fetch_directory
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.stages.evaluation.arms import ensemble, knn, memory, model
from mlpmem_ds.stages.evaluation.arms.arm import Arm, Part
from mlpmem_ds.stages.evaluation.arms.base import Context, ModelArm, Opener, open_base
from mlpmem_ds.stages.evaluation.arms.ensemble import EnsembleArm
from mlpmem_ds.stages.evaluation.arms.memory import MemoryArm
from mlpmem_ds.stages.evaluation.arms.mixed import MixedArm, open_mixed_arms
from mlpmem_ds.stages.evaluation.config import (
    DEFAULT_EXTRA_SPLITS,
    Config,
    control_directories,
    memory_directories,
    named_directories,
)
from mlpmem_ds.stages.evaluation.splits import Split, open_splits, streams_of

OPENERS: tuple[Opener, ...] = (knn.open_arms, memory.open_arms, ensemble.open_arms, model.open_arms)
"""one for each kind of arm, in the order of the report; a new kind is a line here"""
TELLERS = (memory.layers_paths, knn.layers_paths)
"""who says where the base's layers are, if extraction had to be told: the first that says something"""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that the evaluation reads, opened and checked."""

    splits: Mapping[str, Split]
    """in the order tuning, test, further test sets"""
    base: ModelArm
    arms: tuple[Arm, ...]
    """all that have units, in the order of the report, the base first"""
    mixed: tuple[MixedArm, ...]
    """those that are made of them afterwards"""

    @property
    def streams(self) -> dict[str, CorpusSplit]:
        return streams_of(self.splits)

    @property
    def scorers(self) -> tuple[Arm, ...]:
        """The arms that have units, those for gates that read states among them."""
        return (*self.arms, *(arm.states for arm in self.mixed if arm.states is not None))

    def playing(self, part: Part) -> tuple[Arm | MixedArm, ...]:
        """The arms that play a part in the report."""
        every: tuple[Arm | MixedArm, ...] = (*self.arms, *self.mixed)
        return tuple(arm for arm in every if arm.part == part)


def open_inputs(config: Config, world: World) -> Inputs:
    """Open and check everything, models on this rank's device; nothing has been written yet.

    Raises:
        UserError: an input is missing, or does not belong to this base, corpus or datastore.
    """
    config = with_fetched_memories(config)
    splits = open_splits(
        config.corpus,
        tuning=config.tuning_split,
        test=config.test_split,
        extra=config.extra_splits,
        is_extra_requested=config.extra_splits != DEFAULT_EXTRA_SPLITS,
        min_positions=config.bootstrap_block + 1,
    )
    texts = tuple(streams_of(splits).values())
    num_positions = sum(text.num_positions for text in texts)
    device = device_of_rank(config.device, world)
    shared = shared_place(config.output, world)
    base = open_base(config, texts, layers_path=find_layers_path(config), device=device, shared=shared)
    context = Context(
        base=base,
        texts=texts,
        num_positions=num_positions,
        shared=shared,
        ranks_of_host=world.local_size or 1,
    )
    opened = [arm for opener in OPENERS for arm in opener(config, context)]
    arms = _with_different_names([base, *opened])
    refuse_training_text(splits, arms)
    names = memory_directories(config.memory)
    memories = [arm for arm in arms if isinstance(arm, MemoryArm) and arm.name in names]
    ensembles = [arm for arm in arms if isinstance(arm, EnsembleArm)]
    tests = [split for name, split in splits.items() if name != config.tuning_split]
    mixed = tuple(open_mixed_arms(config, base, memories, ensembles, tests))
    return Inputs(splits=splits, base=base, arms=arms, mixed=mixed)


def find_layers_path(config: Config) -> str | None:
    """Where the base's layers are, if extraction had to be told: as the memory says, a control's memory, or
    the keys."""
    return next((path for teller in TELLERS for path in teller(config)), None)


def with_fetched_memories(config: Config) -> Config:
    """The same with directories in the place of Hub names."""
    memories = tuple(
        f"{name.removeprefix('base+')}={fetch_directory(root, flag='--memory')}"
        for name, root in memory_directories(config.memory).items()
    )
    controls = _fetched(control_directories(config.control), "--control")
    ensemble = _fetched(named_directories(config.ensemble, flag="--ensemble"), "--ensemble")
    return replace(config, memory=memories, control=controls, ensemble=ensemble)


def _fetched(directories: Mapping[str, Path], flag: str) -> tuple[str, ...]:
    return tuple(
        f"{name}={fetch_directory(str(root), flag=f'{flag} {name}')}" for name, root in directories.items()
    )


def _with_different_names(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    arms = tuple(arms)
    names: set[str] = set()
    for arm in arms:
        if arm.name in names:
            raise UserError(
                f"two arms have the same name, {arm.name}: choose another for one of the controls"
            )
        names.add(arm.name)
    return arms


def refuse_training_text(splits: Mapping[str, Split], arms: Sequence[Arm]) -> None:
    """Raises UserError where an arm would be judged on text that it holds or was trained on."""
    for split in splits.values():
        for arm in arms:
            if (split.corpus.sha256, split.corpus.name) in arm.trained_on:
                without = "give another --model" if arm.part == "base" else f"leave {arm.name} out"
                raise UserError(
                    f"the {split.name} split is the text that {arm.name} was made from"
                    f" ({split.corpus.root}, {split.corpus.name}): choose other splits, prepare the corpus"
                    f" with --tuning-fraction and --test-fraction, or {without}"
                )
