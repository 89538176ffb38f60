"""Part of `evaluate`: the units of work, each a block of positions that one model's pass serves.

One pass of the base over a block serves every arm that is mixed with it; a control that is a model of its own
has units of its own. Each arm leaves two files of a unit: its scores and its guesses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mlpmem_ds.core.blocks import Block, deal, split_blocks
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.keys import unit_name
from mlpmem_ds.stages.evaluation.arms.arm import Arm
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A block of a corpus split, and the arms that read the same pass over it."""

    name: str
    stream: str
    """the split's name among those that are scored"""
    corpus: CorpusSplit
    block: Block
    forward_pass: ForwardPass
    arms: tuple[Arm, ...]

    def score_file(self, arm: Arm) -> str:
        return self._file("scores", arm)

    def guess_file(self, arm: Arm) -> str:
        return self._file("guesses", arm)

    def confidence_file(self, arm: Arm) -> str:
        return self._file("confidences", arm)

    def _file(self, folder: str, arm: Arm) -> str:
        return f"{folder}/{self.stream}-{arm.name}-{unit_name(self.block.start)}.npy"


def list_units(
    arms: Sequence[Arm], streams: Mapping[str, CorpusSplit], unit_positions: int
) -> dict[str, Unit]:
    """All units by name: first those of the base, which cost the most, then those of each other model."""
    units = {}
    for forward_pass in dict.fromkeys(arm.forward_pass for arm in arms):
        served = tuple(arm for arm in arms if arm.forward_pass is forward_pass)
        model = "" if forward_pass.name is None else f"{forward_pass.name}-"
        for stream, corpus in streams.items():
            for block in split_blocks(corpus.num_positions, unit_positions):
                name = f"{stream}-{model}{unit_name(block.start)}"
                units[name] = Unit(
                    name=name,
                    stream=stream,
                    corpus=corpus,
                    block=block,
                    forward_pass=forward_pass,
                    arms=served,
                )
    return units


class UnitScorer:
    """Computes units: one pass of the model, then what each arm makes of it."""

    def __init__(self, units: Mapping[str, Unit], world: World) -> None:
        self._units = units
        mine = deal(list(units.values()), world.rank, world.size)
        self._progress = Progress(
            sum(unit.block.size for unit in mine), label="evaluation", unit="positions", world=world
        )

    def score(self, name: str, writer: UnitWriter) -> dict[str, Any]:
        """Write a unit's scores and guesses; the summary says how long each arm took."""
        unit = self._units[name]
        seconds: dict[str, float] = {}
        with _timed(seconds, "pass"):
            points = [point for arm in unit.arms for point in arm.reads]
            scan = unit.forward_pass.scan(unit.corpus, unit.block, points)
        own_seconds: dict[str, float] = {}
        for arm in unit.arms:
            arm.load()
            with _timed(own_seconds, arm.name):
                scores = arm.score(scan)
            writer.array(unit.score_file(arm), scores.values)
            writer.array(unit.guess_file(arm), scores.guesses)
            if scores.confidences is not None:
                writer.array(unit.confidence_file(arm), scores.confidences)
        self._progress.advance(unit.block.size)
        return {
            "positions": unit.block.size,
            "pass_seconds": seconds["pass"],
            "seconds": own_seconds,
            "threads": torch.get_num_threads(),
            "device": str(unit.forward_pass.source.device),
        }

    def close(self) -> None:
        self._progress.close()


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 4)
