"""An arm that mixes the base with a second language model of its vocabulary: `--ensemble NAME=DIR`.

What a memory has to be compared with where its gain may be that of any second opinion: two models that err at
different tokens are better together than each alone.

Under a gate (`mixed.py`) it is the control of a gated memory: a model that forgets may still be mixed in
where it helps, at the price of a second model's pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmem_ds.stages.evaluation.arms.arm import (
    Arm,
    Part,
    Price,
    Scores,
    scores_beside_base,
    sum_of_logs,
    tokens_beside_base,
)
from mlpmem_ds.stages.evaluation.arms.base import Context, bytes_of_source, num_parameters
from mlpmem_ds.stages.evaluation.arms.model import open_source
from mlpmem_ds.stages.evaluation.arms.training_records import texts_of_training, tokens_of_training
from mlpmem_ds.stages.evaluation.config import Config, named_directories
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass, Scan


@dataclass(frozen=True, kw_only=True, eq=False)
class EnsembleArm(Arm):
    """The base mixed with another language model, which reads the same text on its own."""

    name: str
    forward_pass: ForwardPass
    second: ForwardPass
    """the other model's"""
    price: Price
    inputs: Mapping[str, str]
    trained_on: tuple[tuple[str, str], ...] = ()
    description: str = "the base mixed with a second language model, both read the text"
    part: Part = "control"
    settings: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)

    def score(self, scan: Scan) -> Scores:
        found = self.second.score_tokens(scan.corpus, scan.block, tokens_beside_base(scan))
        return scores_beside_base(found, scan)


def open_arms(config: Config, context: Context) -> list[EnsembleArm]:
    """The models of `--ensemble`. See `base.Opener`."""
    directories = named_directories(config.ensemble, flag="--ensemble")
    return [_open_ensemble(root, name, config, context) for name, root in directories.items()]


def _open_ensemble(root: Path, name: str, config: Config, context: Context) -> EnsembleArm:
    base, arm, flag = context.base, f"base+{name}", f"--ensemble {name}"
    source, sha256 = open_source(root, flag, config, context)
    return EnsembleArm(
        name=arm,
        forward_pass=base.forward_pass,
        second=ForwardPass(source=source, name=name, batch_windows=config.batch_windows),
        price=base.price.plus(
            parameters=num_parameters(source),
            bytes=bytes_of_source(str(root), source),
            seconds=sum_of_logs([root]),
            tokens=tokens_of_training(root, flag),
        ),
        inputs={arm: sha256},
        trained_on=texts_of_training(root, flag),
    )
